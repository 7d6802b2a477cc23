"""Baselines in PyTorch with the weights of a model of this package: a plain decoder-only model, and Llama and Mixtral of
transformers.

On a CPU they compute in float32; on a GPU they train under autocast to bfloat16, and decode in bfloat16.
"""
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from efficient_lm.models import spec as specs


def device() -> torch.device:
  """The device on which PyTorch runs."""
  return torch.device('cuda' if torch.cuda.is_available() else 'cpu')


def hugging_face_names(model) -> dict[str, torch.Tensor]:
  """The parameters of a model of one stack, with the names of Llama or Mixtral; matrices are (outputs, inputs)."""
  value = lambda weight: np.asarray(weight.materialize())
  linear = lambda array, inputs: array.reshape(inputs, -1).T
  named = {'model.embed_tokens.weight': value(model.embed), 'lm_head.weight': value(model.own_head).T,
           'model.norm.weight': np.asarray(model.norm.scale.get_value())}
  dim = model.embed.materialize().shape[-1]
  for i in range(model.stacks[0].num_layers):
    block = model.stacks[0].layer(i)
    layer = {f'self_attn.{theirs}_proj': linear(value(getattr(block.attention, ours)), dim)
             for theirs, ours in (('q', 'query'), ('k', 'key'), ('v', 'value'))}
    layer['self_attn.o_proj'] = value(block.attention.output).reshape(-1, dim).T
    layer['input_layernorm'] = np.asarray(block.attention_norm.scale.get_value())
    layer['post_attention_layernorm'] = np.asarray(block.mlp_norm.scale.get_value())
    named |= {f'model.layers.{i}.{name}.weight': array for name, array in layer.items()}
    named |= {f'model.layers.{i}.mlp.{name}': array for name, array in _mlp(block.mlp, value)}
  return {name: torch.from_numpy(array.copy()) for name, array in named.items()}


def _mlp(mlp, value):
  """The parameters of a feed-forward layer: three matrices, or a router and the experts' matrices in two arrays."""
  if not hasattr(mlp, 'experts'):
    yield from ((f'{name}_proj.weight', value(getattr(mlp, name)).T) for name in ('gate', 'up', 'down'))
    return
  gate_up_EDF = np.concatenate([value(mlp.experts.gate), value(mlp.experts.up)], -1)
  yield 'gate.weight', value(mlp.router).T
  yield 'experts.gate_up_proj', gate_up_EDF.swapaxes(1, 2)
  yield 'experts.down_proj', value(mlp.experts.down).swapaxes(1, 2)


class Layer(nn.Module):
  """Pre-norm attention and SwiGLU, with PyTorch's fused functions."""

  def __init__(self, attention: specs.GroupedQuery, hidden: int, dim: int, eps: float):
    super().__init__()
    width, kv_width = attention.num_heads * attention.head_dim, attention.num_kv_heads * attention.head_dim
    linear = lambda inputs, outputs: nn.Linear(inputs, outputs, bias=False)
    self.q_proj, self.o_proj = linear(dim, width), linear(width, dim)
    self.k_proj, self.v_proj = linear(dim, kv_width), linear(dim, kv_width)
    self.gate_proj, self.up_proj = linear(dim, hidden), linear(dim, hidden)
    self.down_proj = linear(hidden, dim)
    self.input_layernorm, self.post_attention_layernorm = nn.RMSNorm(dim, eps), nn.RMSNorm(dim, eps)
    self.head_dim = attention.head_dim

  def forward(self, x, rotation, mask):
    batch, length, _ = x.shape
    h = self.input_layernorm(x)
    heads = lambda projected: projected.view(batch, length, -1, self.head_dim).transpose(1, 2)
    q, k, v = heads(self.q_proj(h)), heads(self.k_proj(h)), heads(self.v_proj(h))
    q, k = rotated(q, *rotation), rotated(k, *rotation)
    o = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None,
                                       enable_gqa=q.shape[1] != k.shape[1])
    x = x + self.o_proj(o.transpose(1, 2).reshape(batch, length, -1))
    h = self.post_attention_layernorm(x)
    return x + self.down_proj(F.silu(self.gate_proj(h)) * self.up_proj(h))


def rotated(x, cos, sin):
  """x with rotary embedding (RoPE) applied: dimension i is paired with i + H/2; cos and sin hold each angle twice."""
  a, b = x.chunk(2, -1)
  return x * cos + torch.cat([-b, a], -1) * sin


class Decoder(nn.Module):
  """logits = Decoder(spec, batch)(tokens). The rotary angles and the mask of the batch are computed once, not in each
  step."""

  def __init__(self, spec: specs.Transformer, batch: dict[str, np.ndarray]):
    super().__init__()
    stack = spec.stacks[0]
    self.embed_tokens = nn.Embedding(spec.vocab_size, spec.dim)
    self.layers = nn.ModuleList([Layer(stack.attention, stack.mlp.hidden, spec.dim, spec.norm_eps)
                                 for _ in range(stack.num_layers)])
    self.norm = nn.RMSNorm(spec.dim, spec.norm_eps)
    self.lm_head = nn.Linear(spec.dim, spec.vocab_size, bias=False)
    head_dim = stack.attention.head_dim
    frequency = stack.attention.rope.theta ** (-torch.arange(0, head_dim, 2) / head_dim)
    angle = torch.from_numpy(batch['positions_BT'])[..., None] * frequency
    for name, part in (('cos', angle.cos()), ('sin', angle.sin())):
      self.register_buffer(name, torch.cat([part, part], -1)[:, None], persistent=False)
    segments = torch.from_numpy(batch['segments_BT'])
    inside = (segments[:, None, :, None] == segments[:, None, None, :]).tril()
    self.register_buffer('mask', None if (segments == 1).all() else inside, persistent=False)

  def forward(self, tokens):
    x = self.embed_tokens(tokens)
    for layer in self.layers: x = layer(x, (self.cos, self.sin), self.mask)
    return self.lm_head(self.norm(x))


def decoder(model, spec: specs.Transformer, batch: dict[str, np.ndarray]) -> Decoder:
  """The plain model with the parameters of `model`."""
  short = {name.replace('model.', '').replace('self_attn.', '').replace('mlp.', ''): tensor
           for name, tensor in hugging_face_names(model).items()}
  theirs = Decoder(spec, batch)
  theirs.load_state_dict(short)
  return theirs.to(device())


def hugging_face(model, spec: specs.Transformer, experts: str | None = None):
  """LlamaForCausalLM with the parameters of `model`; or MixtralForCausalLM, if `experts` names how it computes its
  experts."""
  import transformers
  stack = spec.stacks[0]
  attention = stack.attention
  shape = dict(
    vocab_size=spec.vocab_size, hidden_size=spec.dim, intermediate_size=stack.mlp.hidden,
    num_hidden_layers=stack.num_layers, num_attention_heads=attention.num_heads, head_dim=attention.head_dim,
    num_key_value_heads=attention.num_kv_heads, rms_norm_eps=spec.norm_eps, tie_word_embeddings=False,
    rope_parameters={'rope_theta': attention.rope.theta, 'rope_type': 'default'},
    max_position_embeddings=4096, bos_token_id=None, eos_token_id=None, attn_implementation='sdpa')
  if experts is None: theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape))
  else:
    theirs = transformers.MixtralForCausalLM(transformers.MixtralConfig(
      **shape, num_local_experts=stack.mlp.num_experts, num_experts_per_tok=stack.mlp.router.top_k))
    theirs.set_experts_implementation(experts)
  theirs.load_state_dict(hugging_face_names(model))
  return theirs.to(device())


def trainer(model, logits: Callable, batch: dict[str, np.ndarray], optimizer, rates: list[float], *,
            fused: bool) -> Callable[[], float]:
  """A function that takes one training step on `batch` and returns the loss before it, as the trainer of this package does,
  without its non-finite guard.

  optimizer: an `optimizers.AdamW`, whose settings are used. rates: its learning rate at each step.
  """
  matrices = [p for p in model.parameters() if p.ndim > 1]
  vectors = [p for p in model.parameters() if p.ndim == 1]
  adam = torch.optim.AdamW(
    [dict(params=matrices, weight_decay=optimizer.weight_decay), dict(params=vectors, weight_decay=0.0)],
    lr=1.0, betas=(optimizer.b1, optimizer.b2), eps=optimizer.eps, fused=fused, foreach=not fused)
  schedule = torch.optim.lr_scheduler.LambdaLR(adam, lambda step: rates[min(step, len(rates) - 1)])
  tokens = torch.from_numpy(batch['inputs_BT']).long().to(device())
  labels = torch.from_numpy(np.where(batch['weights_BT'], batch['targets_BT'], -100))
  labels = labels.long().flatten().to(device())
  model.train()

  def step() -> float:
    with torch.autocast(device().type, torch.bfloat16, enabled=device().type == 'cuda'):
      loss = F.cross_entropy(logits(tokens).flatten(0, 1).float(), labels)
    adam.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), optimizer.clip)
    adam.step()
    schedule.step()
    return loss.item()
  return step


def generator(model, prompt_BT: np.ndarray, num_tokens: int) -> Callable[[], np.ndarray]:
  """A function that decodes greedily with a cache and returns the new ids, (B, num_tokens)."""
  if device().type == 'cuda': model = model.to(torch.bfloat16)
  prompt = torch.from_numpy(prompt_BT).long().to(device())
  model.eval()
  def generate():
    ids = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=num_tokens,
                         min_new_tokens=num_tokens, do_sample=False, use_cache=True, pad_token_id=0)
    return ids[:, prompt.shape[1]:].cpu().numpy()
  return generate
