"""Tries tiles of kernels on this device and reports the fastest, as lines for an operation's `tiles.py`."""
import dataclasses
import json
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import jax

from efficient_lm.benches import ops, timer
from efficient_lm.benches.op_speed import apart, brief, expected
from efficient_lm.benches.tile_spaces import SPACES
from efficient_lm.ops import dispatch

SECONDS = 0.3   # for which each candidate is timed


@dataclasses.dataclass(frozen=True, kw_only=True)
class Found:
  """The fastest tiles of a kernel for a case. entry: the table in the operation's tiles.py, the key and the tiles as Python
  text; the tiles are None where the default was the fastest. seconds, default: medians of one call with these and with
  default tiles. tried: the numbers of candidates that were tried, and of all."""
  op: str
  case: str
  implementation: str
  entry: tuple[str, str, str | None]
  seconds: float
  default: float
  tried: tuple[int, int]

  @property
  def line(self) -> str:
    """The line to be pasted into the table."""
    (table, key, tiles), tried = self.entry, f'{self.tried[0]} of {self.tried[1]} tried'
    where = f'{self.op}, {table}, {self.implementation}, {self.case}'
    if tiles is None: return f'# {where}: the default is the fastest, {tried}'
    return f'{key}: {tiles},   # {where}: {self.default / self.seconds:.2f} times as fast as the default, {tried}'


def seconds_of(function: Callable, arguments, sets, wanted, tolerance: float) -> float:
  """Median seconds of one call. Raises ValueError if the error of the result exceeds `tolerance`."""
  compiled = jax.jit(function).lower(*arguments).compile()
  error = float(apart(compiled(*arguments), wanted))
  if not error <= tolerance: raise ValueError(f'error {error:.1e}, rounding is {tolerance:.1e}')
  calls = timer.of_function(compiled, function, sets)
  return statistics.median(timer.take_turns({'it': calls}, SECONDS, 7)['it'])


def tuned(op: ops.Op, name: str, case, budget: float, say: Callable[[str], None]) -> list[Found]:
  """The fastest tiles of each kernel that runs here and takes the case, of as many candidates as `budget` seconds allow, in
  a fixed random order."""
  found, here = [], dispatch.device()
  kernels = [kernel for kernel, one in op.implementations.items() if ops.is_kernel(one) and ops.suits(one, here)]
  space = SPACES[op.name](case, here.platform) if kernels and op.name in SPACES else None
  if space is None: return []
  table, key, candidates = space
  arguments = jax.block_until_ready(case.arguments())
  wanted, _ = expected(case, arguments)
  sets = timer.copies(arguments)
  for kernel in kernels:
    end, times = time.monotonic() + budget / len(kernels), {}
    order = [None, *random.Random(0).sample(list(candidates), len(candidates))]
    for tiles in order:
      if tiles is not None and time.monotonic() > end: break
      try: times[tiles] = seconds_of(case.call(kernel, tiles), arguments, sets, wanted, case.tolerance)
      except Exception as error:   # Some tiles do not compile; the others are tried nevertheless.
        say(f'{op.name}, {name}, {kernel}, {tiles or "default"}: {brief(error)}')
        if tiles is None: break   # the kernel refuses the case, or fails with its default tiles
    if None not in times: continue
    best = min(times, key=times.get)
    found.append(Found(op=op.name, case=name, implementation=kernel, entry=(table, repr(key), best and repr(best)),
                       seconds=times[best], default=times[None], tried=(len(times) - 1, len(candidates))))
  return found


def run(work: list, budget: float, say: Callable[[str], None]) -> list[Found]:
  """Tunes the cases (see `op_speed.in_turn`) one after another within `budget` seconds, and passes each line found to
  `say`."""
  found, end = [], time.monotonic() + budget
  for i, (op, name, case) in enumerate(work):
    left = end - time.monotonic()
    if left <= 0: say(f'{op.name}, {name}: out of time')
    else:
      for one in tuned(op, name, case, left / (len(work) - i), say):
        say(one.line)
        found.append(one)
      jax.clear_caches()
  return found


def write(found: list[Found], folder) -> Path:
  """Writes tuned.json, the entries with their seconds, into `folder`, and returns its path."""
  path = Path(folder) / 'tuned.json'
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(json.dumps([dataclasses.asdict(one) for one in found], indent=2) + '\n', encoding='utf-8')
  return path
