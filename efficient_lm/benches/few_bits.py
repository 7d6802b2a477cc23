"""Cases that decode with weights in few bits, against the same model in float32: dense models and mixtures of experts."""
import functools

import jax
import numpy as np

from efficient_lm import formats
from efficient_lm.benches.models import dtype, little, mixture
from efficient_lm.benches.result import OURS, Case
from efficient_lm.models import decode
from efficient_lm.models import spec as specs
from efficient_lm.runs import measure
from efficient_lm.training.learner import new_model
from efficient_lm.tree import rewrite
from efficient_lm.weights.quantized import round_to_nearest
from efficient_lm.weights.weight import Weight

PROMPT, TOKENS = 8, 16   # a short prompt: what is timed is the reading of weights, once a token
FORMATS = {'int8': formats.Int(), 'int4': formats.Int(bits=4, scales=formats.Group(size=64))}


def smol(quick: bool) -> specs.Transformer:
  """SmolLM2-135M's shape with 6 of its 30 layers, so that it compiles quickly; the head is then most of what is read."""
  if quick: return little()
  attention = specs.GroupedQuery(num_heads=9, num_kv_heads=3, head_dim=64)
  stack = specs.Stack(num_layers=6, attention=attention, mlp=specs.SwiGLU(hidden=1536))
  return specs.Transformer(vocab_size=49152, dim=576, stacks=(stack,), tied=True, dtype=dtype())


def experts(num_experts: int, quick: bool) -> specs.Transformer:
  """Two layers of width 512 with experts of 1024 units, two of them for each token."""
  if quick: return little(mixture(num_experts, 64))
  attention = specs.GroupedQuery(num_heads=8, num_kv_heads=8, head_dim=64)
  stack = specs.Stack(num_layers=2, attention=attention, mlp=mixture(num_experts, 1024))
  return specs.Transformer(vocab_size=320, dim=512, stacks=(stack,), dtype=dtype())


def decoding(spec: specs.Transformer, name: str, batch: int, target: float | None = None) -> Case:
  """Greedy decoding of `batch` sequences with all matrices but routers in a format of FORMATS, and the same in floats. Their
  texts are not required to agree: weights are random."""
  model = new_model(spec, jax.random.key(0))
  change = lambda path, weight: weight if 'router' in path else round_to_nearest(weight, FORMATS[name])
  stored = jax.jit(lambda model: rewrite(model, Weight, change))(model)
  candidates = {OURS: _burst(stored, spec, batch), f'ours in {spec.dtype}': _burst(model, spec, batch)}
  flops = measure.flops_per_token(model, PROMPT + TOKENS).forward * TOKENS * batch
  return Case(candidates=candidates, tokens=TOKENS * batch, target=target, flops=flops,
              agreement=f'weights in {FORMATS[name].name}; {batch} sequences')


def _burst(model, spec: specs.Transformer, batch: int):
  """A function that draws TOKENS tokens after a prompt that has been read."""
  model = decode.ready(model)
  prompt_BT = np.random.default_rng(0).integers(0, spec.vocab_size, (batch, PROMPT)).astype(np.int32)
  prefill = functools.partial(decode.prefill, length=PROMPT + TOKENS, vocab_size=spec.vocab_size)
  logits_BV, cache = prefill(model, prompt_BT)
  def call():
    # The cache is given away by each burst: its copy is small beside the weights.
    ids, *_ = decode.burst(model, logits_BV, jax.tree.map(lambda a: a.copy(), cache), PROMPT, jax.random.key(0),
                           decode.Sampling(temperature=0.0), count=TOKENS, vocab_size=spec.vocab_size)
    return np.asarray(ids)
  return call
