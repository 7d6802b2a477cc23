"""Tensors of a GGUF file under the names, in the orientation and in the order of rows of Hugging Face."""
import re
from collections.abc import Callable, Iterator

import numpy as np

from efficient_lm.errors import IncompatibleError
from efficient_lm.interop.checkpoint import Checkpoint, Packed, Tensor
from efficient_lm.interop.gguf import blocks, config, unpacking
from efficient_lm.interop.gguf.reader import File, quoted

_ATTENTION = {'attn_q': 'self_attn.q_proj', 'attn_k': 'self_attn.k_proj', 'attn_v': 'self_attn.v_proj',
              'attn_output': 'self_attn.o_proj', 'attn_q_norm': 'self_attn.q_norm', 'attn_k_norm': 'self_attn.k_norm'}
_GATED = {'ffn_gate': 'mlp.gate_proj', 'ffn_up': 'mlp.up_proj', 'ffn_down': 'mlp.down_proj'}
_ENDS = {'token_embd': 'model.embed_tokens', 'output_norm': 'model.norm', 'output': 'lm_head'}
LAYERS = {   # what stands behind 'blk.<i>.', and behind the name of the layer there
  'llama': {**_ATTENTION, **_GATED, 'attn_norm': 'input_layernorm', 'ffn_norm': 'post_attention_layernorm',
            'ffn_gate_inp': 'mlp.gate', 'ffn_gate_shexp': 'mlp.shared_expert.gate_proj',
            'ffn_up_shexp': 'mlp.shared_expert.up_proj', 'ffn_down_shexp': 'mlp.shared_expert.down_proj',
            'ffn_gate_inp_shexp': 'mlp.shared_expert_gate'},
  'post_norm': {**_ATTENTION, **_GATED, 'post_attention_norm': 'post_attention_layernorm',
                'post_ffw_norm': 'post_feedforward_layernorm'},
  'sandwich': {**_ATTENTION, **_GATED, 'attn_norm': 'input_layernorm', 'post_attention_norm': 'post_attention_layernorm',
               'ffn_norm': 'pre_feedforward_layernorm', 'post_ffw_norm': 'post_feedforward_layernorm'},
  'gpt2': {'attn_norm': 'ln_1', 'attn_qkv': 'attn.c_attn', 'attn_output': 'attn.c_proj', 'ffn_norm': 'ln_2',
           'ffn_up': 'mlp.c_fc', 'ffn_down': 'mlp.c_proj'}}
ENDS = {'llama': _ENDS, 'post_norm': _ENDS, 'sandwich': _ENDS, 'gpt2': {
  'token_embd': 'transformer.wte', 'position_embd': 'transformer.wpe', 'output_norm': 'transformer.ln_f',
  'output': 'lm_head'}}
SHARED_GATE = 'ffn_gate_inp_shexp'   # a vector there, a matrix of one row here
EXPERTS = {'ffn_gate': ('gate_proj', 'w1'), 'ffn_up': ('up_proj', 'w3'), 'ffn_down': ('down_proj', 'w2')}   # w1 …: Mixtral


def checkpoint(file: File) -> Checkpoint:
  """Raises IncompatibleError for a model that is not understood, and for tensors that its architecture has no place for."""
  made, found = config.config_of(file), {}
  for name in file.tensors:
    if name == 'rope_freqs.weight': continue   # in the config
    places = dict(_tensors(file, name, made))
    if not places: raise IncompatibleError(f'{file.path}: the architecture has no place for the tensor {quoted(name)}')
    found |= places
  return Checkpoint(made, found, file.path)


def _tensors(file: File, name: str, made: dict) -> Iterator[tuple[str, Tensor]]:
  """What a tensor becomes: one tensor, or one for each expert, by name; nothing, where the name is not known."""
  architecture = config.architecture_of(file)
  shape = file.tensors[name].shape
  inside = re.fullmatch(r'blk\.(0|[1-9]\d{0,5})\.(\w+?)(_exps)?\.(?:(0|[1-9]\d{0,5})\.)?(weight|bias)', name, re.ASCII)
  if inside is None:
    stem, _, kind = name.rpartition('.')
    ends = ENDS[architecture.names]
    if stem not in ends or kind not in ('weight', 'bias'): return
    yield f'{ends[stem]}.{kind}', _tensor(file, name, shape, _change(stem, kind, architecture, made))
    return
  layer, stem, together, expert, kind = inside.groups()
  mixtral = made['model_type'] == 'mixtral'
  if together or expert:
    if stem not in EXPERTS or kind != 'weight' or (together and (expert or len(shape) != 3)): return
    root = f'model.layers.{layer}.{"block_sparse_moe" if mixtral else "mlp"}.experts'
    for e in range(shape[0]) if together else [int(expert)]:
      part = _tensor(file, name, shape[1:], None, e) if together else _tensor(file, name, shape, None)
      yield f'{root}.{e}.{EXPERTS[stem][mixtral]}.weight', part
    return
  if stem not in LAYERS[architecture.names]: return
  place = LAYERS[architecture.names][stem]
  if mixtral and stem == 'ffn_gate_inp': place = 'block_sparse_moe.gate'
  root = 'transformer.h' if architecture.names == 'gpt2' else 'model.layers'
  change = _change(stem, kind, architecture, made)
  if change is np.transpose and len(shape) == 2: shape = shape[::-1]
  if stem == SHARED_GATE and len(shape) == 1: shape = (1, *shape)
  yield f'{root}.{layer}.{place}.{kind}', _tensor(file, name, shape, change)


def _change(stem: str, kind: str, architecture: config.Architecture, made: dict) -> Callable | None:
  """What has to be done to a tensor, beside dequantizing it."""
  if architecture.permuted and stem in ('attn_q', 'attn_k'):
    heads = made['num_attention_heads' if stem == 'attn_q' else 'num_key_value_heads']
    return lambda rows: halves(rows, heads)
  if architecture.plus_one and stem.endswith('norm'): return lambda scale: scale - np.float32(1)
  if is_transposed(stem, kind, architecture): return np.transpose
  if stem == SHARED_GATE: return np.atleast_2d
  return None


def is_transposed(stem: str, kind: str, architecture: config.Architecture) -> bool:
  """Whether Hugging Face has a tensor as (inputs, outputs)."""
  return architecture.transposed and kind == 'weight' and not stem.endswith(('embd', 'norm')) and stem != 'output'


def halves(rows: np.ndarray, heads: int) -> np.ndarray:
  """Rows of heads in which row 2i is rotated with row 2i + 1, ordered such that row i is rotated with row i + H / 2."""
  if len(rows) % (2 * heads): raise IncompatibleError(f'{len(rows)} rows cannot be those of {heads} heads of an even size')
  return rows.reshape(heads, -1, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def _tensor(file: File, name: str, shape: tuple[int, ...], change: Callable | None, expert: int | None = None) -> Tensor:
  kind, move = file.tensors[name].kind, change or (lambda rows: rows)

  def packed(rows: slice):
    raw = file.bytes_of(name)
    if expert is not None: raw = raw.reshape(file.tensors[name].shape[0], -1)[expert]
    return unpacking.encoded(move(raw.reshape(shape[0], -1))[rows], kind)   # whole rows, whatever is in them
  whole_rows = len(shape) == 2 and change is not np.transpose
  return Tensor(shape, blocks.dtype(kind), lambda: move(file.numbers(name, expert)),
                Packed(unpacking.FORMATS[kind], packed) if whole_rows and kind in unpacking.FORMATS else None,
                lambda: file.let_go(name))
