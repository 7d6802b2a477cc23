"""How long does GPTQ take on a model of 124 million parameters?

  python experiments/quantization/gptq_124m.py

All layers in 4 bits, 128 inputs to a scale, calibrated on 16,384 tokens: eight times as many as the widest input has
channels. Weights and tokens are random, which changes no shape; compilation is included.
"""
import dataclasses
import time

import jax
import numpy as np

from efficient_lm.compression import rules
from efficient_lm.compression.rules import Rule
from efficient_lm.formats import Group, Int
from efficient_lm.models import zoo
from efficient_lm.runs import ledger, stages
from efficient_lm.runs.allocator import use_huge_pages
from efficient_lm.techniques.quantization.gptq import Gptq
from efficient_lm.techniques.quantization.ptq import Quantize
from efficient_lm.training.learner import new_model

ROWS, LENGTH, BATCH = 64, 256, 8


def batches(vocab_size: int, count: int):
  """Random tokens, each row one document."""
  rng = np.random.default_rng(0)
  place = np.tile(np.arange(LENGTH, dtype=np.int32), (BATCH, 1))
  for _ in range(count):
    tokens = rng.integers(0, vocab_size, (BATCH, LENGTH)).astype(np.int32)
    yield {'inputs_BT': tokens, 'positions_BT': place, 'segments_BT': np.ones_like(place)}


if __name__ == '__main__':
  use_huge_pages()
  spec = dataclasses.replace(zoo.gpt2_124m(), dtype='float32')
  model = new_model(spec, jax.random.key(0))
  context = stages.Context(jax.random.key(1), lambda count: batches(spec.vocab_size, count))
  stage = Quantize(rules=(Rule(weights=Int(bits=4, scales=Group(size=128))),), method=Gptq(), sequences=ROWS)
  for what in ('with compilation', 'compiled'):
    clock = time.perf_counter()
    stored, _ = stage(model, context)
    jax.block_until_ready(jax.tree.leaves(stored))
    print(f'{time.perf_counter() - clock:.1f} s, {what}', flush=True)
  size = sum(line.num_bytes for line in rules.table(stored)) / sum(line.float_bytes for line in rules.table(stored))
  print(f'{size:.3f} of the bytes of float32, embedding in float; {ledger.hardware()}')
