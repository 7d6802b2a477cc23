"""How long does GPTQ take on a model of 124 million parameters?

  python experiments/quantization/gptq_124m.py

All layers in 4 bits, 128 inputs to a scale, calibrated on 16,384 tokens: eight times as many as the widest input has
channels. Weights and tokens are random, which changes no shape; compilation is included.
"""
import dataclasses
import time
from collections.abc import Iterator

import jax
import numpy as np

from efficient_lm.compression import rewriting
from efficient_lm.formats import Group, Int
from efficient_lm.models import zoo
from efficient_lm.runs import ledger
from efficient_lm.runs.allocator import use_huge_pages
from efficient_lm.techniques import Gptq, Quantize, Rule
from efficient_lm.training.learner import new_model

ROWS, LENGTH, BATCH = 64, 256, 8


@dataclasses.dataclass
class RandomText:
  """What `Quantize` asks of a stage's context: a mesh, and batches, here of random tokens, each row one document."""
  vocab_size: int
  length: int = LENGTH
  mesh: None = None

  def batches(self, count: int) -> Iterator[dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    place = np.tile(np.arange(self.length, dtype=np.int32), (BATCH, 1))
    for _ in range(count):
      tokens = rng.integers(0, self.vocab_size, (BATCH, self.length)).astype(np.int32)
      yield {'inputs_BT': tokens, 'positions_BT': place, 'segments_BT': np.ones_like(place)}


def timed(model, text: RandomText, rows: int = ROWS):
  """Quantizes twice; prints the seconds with compilation and without, and the share of float32's bytes."""
  stage = Quantize(rules=(Rule(weights=Int(bits=4, scales=Group(size=128))),), method=Gptq(), sequences=rows)
  for what in ('with compilation', 'compiled'):
    clock = time.perf_counter()
    stored, _ = stage(model, text)
    jax.block_until_ready(jax.tree.leaves(stored))
    print(f'{time.perf_counter() - clock:.1f} s, {what}', flush=True)
  lines = rewriting.table(stored)
  share = sum(line.num_bytes for line in lines) / sum(line.float_bytes for line in lines)
  print(f'{share:.3f} of the bytes of float32, embedding in float; {ledger.hardware()}')


if __name__ == '__main__':
  use_huge_pages()
  spec = dataclasses.replace(zoo.gpt2_124m(), dtype='float32')
  timed(new_model(spec, jax.random.key(0)), RandomText(spec.vocab_size))
