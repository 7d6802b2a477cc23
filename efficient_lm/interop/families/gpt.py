"""GPT-2 and OPT: LayerNorm, biases everywhere, a table of positions, a feed-forward layer without a gate, a tied head."""
from efficient_lm.interop.families import llama
from efficient_lm.interop.families.keys import MOST_LAYERS, Keys
from efficient_lm.interop.families.places import Part, Parts, Place, alone, biased, of_layers
from efficient_lm.models import spec

OFFSET = 2   # OPT's table begins with two rows that no position of a text without padding reads (`modeling_opt.py`)


def gpt2(keys: Keys) -> spec.Transformer:
  """The description; old configs have keys of both spellings, which must agree."""
  dim, heads = keys.whole('n_embd'), keys.whole('n_head')
  for key, own in (('hidden_size', 'n_embd'), ('num_attention_heads', 'n_head'), ('num_hidden_layers', 'n_layer')):
    if keys.get(key, keys.get(own)) != keys.get(own): keys.refuse(key, f'says something else than {own}')
  keys.off('scale_attn_by_inverse_layer_idx', 'add_cross_attention', 'is_encoder_decoder')
  keys.flag('reorder_and_upcast_attn', False)   # the order of operations only
  if dim % heads: keys.refuse('n_head', f'must divide n_embd = {dim}')
  attention = spec.GroupedQuery(num_heads=heads, num_kv_heads=heads, head_dim=dim // heads, rope=None, biases=llama.ALL,
                                scale=None if keys.flag('scale_attn_weights', True) else 1.0)
  activation = llama.activation_of(keys, 'activation_function', 'gelu_new')
  mlp = spec.Plain(hidden=keys.whole('n_inner', 4 * dim), activation=activation)
  stack = spec.Stack(num_layers=keys.whole('n_layer', most=MOST_LAYERS), attention=attention, mlp=mlp)
  return spec.Transformer(
    vocab_size=keys.whole('vocab_size'), dim=dim, stacks=(stack,), tied=keys.flag('tie_word_embeddings', True),
    norm_eps=keys.number('layer_norm_epsilon', 1e-5), dtype=llama.dtype(keys), norm=spec.LayerNorm(),
    ends=spec.Ends(positions=spec.Learned(length=keys.whole('n_positions', 1024))))


def opt(keys: Keys) -> spec.Transformer:
  """The description. The one of 350M normalises after its branches and projects its embedding: refused."""
  dim, heads = keys.whole('hidden_size'), keys.whole('num_attention_heads')
  keys.only('do_layer_norm_before', True, default=True, fix='is OPT-350M\'s, which normalises after its branches')
  keys.only('word_embed_proj_dim', dim, None, fix='is OPT-350M\'s, which projects its embedding')
  keys.off('_remove_final_layer_norm')
  keys.only('enable_bias', True, default=True)
  keys.only('layer_norm_elementwise_affine', True, default=True)
  if dim % heads: keys.refuse('num_attention_heads', f'must divide hidden_size = {dim}')
  attention = spec.GroupedQuery(num_heads=heads, num_kv_heads=heads, head_dim=dim // heads, rope=None, biases=llama.ALL)
  mlp = spec.Plain(hidden=keys.whole('ffn_dim'), activation=llama.activation_of(keys, 'activation_function', 'relu'))
  stack = spec.Stack(num_layers=keys.whole('num_hidden_layers', most=MOST_LAYERS), attention=attention, mlp=mlp)
  return spec.Transformer(
    vocab_size=keys.whole('vocab_size'), dim=dim, stacks=(stack,), tied=keys.flag('tie_word_embeddings', True),
    norm_eps=1e-5, dtype=llama.dtype(keys), norm=spec.LayerNorm(),
    ends=spec.Ends(positions=spec.Learned(length=keys.whole('max_position_embeddings', 2048))))


def gpt2_places(model: spec.Transformer, keys: Keys) -> dict[str, Place]:
  """Matrices are (inputs, outputs); queries, keys and values come from one."""
  del keys
  head = {} if model.tied else {'own_head/array': Part('lm_head.weight', 'V D')}
  return of_layers(model, 'transformer.h.{l}.', _gpt2_parts) | alone(head | _norm('norm', 'transformer.ln_f') | {
    'embed/array': Part('transformer.wte.weight', 'V D'), 'positions/array': Part('transformer.wpe.weight', 'T D')})


def _gpt2_parts(layer: spec.Layer, stack) -> Parts:
  N, parts = layer.attention.num_heads, _norm('attention_norm', 'ln_1') | _norm('mlp_norm', 'ln_2')
  for i, (path, heads) in enumerate((('query', 'N'), ('key', 'K'), ('value', 'K'))):
    cut = (heads, i * N, 3 * N)
    parts |= biased(f'attention/{path}', Part('attn.c_attn.weight', f'D {heads}H', cut),
                    Part('attn.c_attn.bias', f'{heads}H', cut))
  return parts | biased('attention/output', Part('attn.c_proj.weight', 'NH D'), Part('attn.c_proj.bias', 'D')) | biased(
    'mlp/up', Part('mlp.c_fc.weight', 'D F'), Part('mlp.c_fc.bias', 'F')) | biased(
    'mlp/down', Part('mlp.c_proj.weight', 'F D'), Part('mlp.c_proj.bias', 'D'))


def opt_places(model: spec.Transformer, keys: Keys) -> dict[str, Place]:
  """Matrices are (outputs, inputs), each by itself."""
  del keys
  head = {} if model.tied else {'own_head/array': Part('lm_head.weight', 'V D')}
  table = Part('model.decoder.embed_positions.weight', 'T D', ('T', OFFSET, model.ends.positions.length + OFFSET))
  norm = _norm('norm', 'model.decoder.final_layer_norm')
  return of_layers(model, 'model.decoder.layers.{l}.', _opt_parts) | alone(head | norm | {
    'embed/array': Part('model.decoder.embed_tokens.weight', 'V D'), 'positions/array': table})


def _opt_parts(layer: spec.Layer, stack) -> Parts:
  parts = _norm('attention_norm', 'self_attn_layer_norm') | _norm('mlp_norm', 'final_layer_norm')
  for path, (name, layout, outputs) in llama.ATTENTION.items():
    name = f'self_attn.{"out_proj" if path == "output" else name}'
    parts |= biased(f'attention/{path}', Part(f'{name}.weight', layout), Part(f'{name}.bias', outputs))
  return parts | biased('mlp/up', Part('fc1.weight', 'F D'), Part('fc1.bias', 'F')) | biased(
    'mlp/down', Part('fc2.weight', 'D F'), Part('fc2.bias', 'D'))


def _norm(path: str, name: str) -> Parts:
  return {f'{path}/scale': Part(f'{name}.weight', 'D'), f'{path}/bias': Part(f'{name}.bias', 'D')}
