"""Batches as a pure function of (seed, step): to resume, a run needs the number of its step and nothing else.

Example i of training is row `permutation_e(i mod N)` of the N rows, epoch e = i // N; batch `step` is
examples step*B … step*B + B - 1, so a batch may span two epochs. Every process computes the same order and
reads its own contiguous part of each global batch: put together, batches are the same for any number of
processes.
"""
import functools
import sys
from collections.abc import Iterator

import numpy as np

from efficient_lm.data.packing import Batch, Rows
from efficient_lm.errors import ConfigError
from efficient_lm.lazy import lazy

grain = lazy('grain')

_PREFETCH = 4  # batches made ahead by one thread: enough to hide numpy behind a step, little memory


class Batches:
  """Endless training batches, shuffled anew in every epoch.

  Attributes of the constructor:
    rows: what to draw from, at least one.
    batch_size: rows of the global batch, a multiple of process_count, or ConfigError.
    seed: any integer that is not negative.
  """

  def __init__(self, rows: Rows, *, batch_size: int, seed: int, process_index: int = 0,
               process_count: int = 1):
    self.rows, self.batch_size, self.seed = rows, batch_size, seed
    self.part = part(batch_size, process_index, process_count)

  def __len__(self) -> int:
    return sys.maxsize // self.batch_size  # what grain calls endless

  def __getitem__(self, step: int) -> Batch:
    """This process's part of the batch of `step` >= 0."""
    if not 0 <= step < len(self): raise IndexError(f'no step {step}')
    return self.rows[[self._order[step * self.batch_size + example] for example in self.part]]

  @functools.cached_property
  def _order(self):
    """Example number -> row number, by a pseudo-random permutation that needs no memory."""
    # grain shuffles epoch e with seed + e: without mixing, nearby seeds would share epochs.
    mixed = int(np.random.SeedSequence(self.seed).generate_state(1)[0])
    return grain.MapDataset.range(len(self.rows)).shuffle(seed=mixed).repeat()

  def iterate(self, start_step: int = 0) -> Iterator[Batch]:
    """self[start_step], self[start_step + 1], … without end, made ahead in a thread."""
    ahead = grain.ReadOptions(num_threads=1, prefetch_buffer_size=_PREFETCH)
    return iter(grain.MapDataset.source(self)[start_step:].to_iter_dataset(ahead))


def in_sequence(rows: Rows, *, batch_size: int, process_index: int = 0, process_count: int = 1) -> Iterator[Batch]:
  """Each row once, in order, `batch_size` at a time over all processes; the last batch is padded to the same shape."""
  mine = part(batch_size, process_index, process_count)
  for first in range(0, len(rows), batch_size): yield rows[[first + example for example in mine]]


def part(batch_size: int, process_index: int, process_count: int) -> range:
  """Which examples of a global batch are this process's. Raises ConfigError when they do not divide."""
  if batch_size < 1 or batch_size % process_count:
    raise ConfigError('train.batch_size', batch_size, f'a positive multiple of {process_count} is needed')
  size = batch_size // process_count
  return range(process_index * size, process_index * size + size)
