"""Cases that read a prompt with what pruning leaves: block-sparse weights, against the same numbers in whole matrices, zeros
and all; and a narrower model, against the whole one."""
import functools

import jax
import numpy as np

from efficient_lm.benches.models import dtype, little
from efficient_lm.benches.result import OURS, Case, difference, within
from efficient_lm.compression import dimensions, selection
from efficient_lm.compression.shape import Shape
from efficient_lm.models import decode
from efficient_lm.models import spec as specs
from efficient_lm.runs import measure
from efficient_lm.techniques import PruneBlocks
from efficient_lm.training.learner import new_model
from efficient_lm.tree import rewrite
from efficient_lm.weights.block_sparse import BlockSparse
from efficient_lm.weights.weight import Dense

TOKENS = 512
TOLERANCE = {'float32': 1e-4, 'bfloat16': 2e-2}   # relative difference of logits: the order of sums


def wide(quick: bool) -> specs.Transformer:
  """Two layers of TinyLlama's shape: 91 million parameters in their matrices, and a small head."""
  if quick: return little()
  attention = specs.GroupedQuery(num_heads=16, num_kv_heads=4, head_dim=128)
  stack = specs.Stack(num_layers=2, attention=attention, mlp=specs.SwiGLU(hidden=5632), unroll=2)
  return specs.Transformer(vocab_size=320, dim=2048, stacks=(stack,), dtype=dtype())


def reads(spec, length: int):
  """call(model): a function that reads a prompt of so many tokens."""
  prompt_BT = np.random.default_rng(0).integers(0, spec.vocab_size, (1, length)).astype(np.int32)
  prefill = functools.partial(decode.prefill, length=length, vocab_size=spec.vocab_size)
  def call(model):
    model = decode.ready(model)   # layers by themselves: slices of stacked matrices are copied first, more of whole ones
    return lambda: jax.block_until_ready(prefill(model, prompt_BT))[0]
  return call


def narrow(quick: bool, share: float, target: float | None = None) -> Case:
  """Reading a prompt with a share of the residual channels, all heads and hidden units."""
  spec, length = wide(quick), 64 if quick else TOKENS
  whole = new_model(spec, jax.random.key(0))
  left = dimensions.counts(whole, Shape(width=share))
  smaller = dimensions.Removal(whole, selection.chosen(whole, left, selection.unscored(left)))(whole)
  call, flops = reads(spec, length), [measure.flops_per_token(model, length).forward for model in (smaller, whole)]
  return Case(candidates={OURS: call(smaller), 'ours, the whole model': call(whole)}, tokens=length, target=target,
              flops=length * flops[1], agreement=f'{flops[0] / flops[1]:.1%} of the FLOPs, and another model')


def prefill(quick: bool, sparsity: float, target: float | None = None) -> Case:
  """Reading a prompt, with all matrices of attention and feed-forward layers in kept blocks of 32 inputs by 256 outputs.
  The head and attention's own products are dense."""
  spec, length = wide(quick), 64 if quick else TOKENS
  stage = PruneBlocks(sparsity=sparsity, block=(4, 16) if quick else (32, 256))
  sparse = jax.jit(stage.abstract)(new_model(spec, jax.random.key(0)))
  whole = rewrite(sparse, BlockSparse, lambda _, weight: Dense(weight.materialize(), weight.axes, weight.inputs))
  call = reads(spec, length)
  candidates = {OURS: call(sparse), f'ours, whole matrices in {spec.dtype}': call(whole)}
  apart = difference('logits', *(candidate() for candidate in candidates.values()), TOLERANCE[spec.dtype])
  flops = [measure.flops_per_token(model, length).forward for model in (sparse, whole)]
  return Case(candidates=candidates, tokens=length, target=target, flops=length * flops[1],
              agreement=f'{within("logits", apart)}; {flops[0] / flops[1]:.1%} of the FLOPs')
