"""Times one call on an accelerator, where a call may take less time than starting it.

A `Calls` starts many calls and waits once, for the last one. Each call reads its own copy of the arguments, so that caches
do not hold them already, as in a program that computes other things between two calls. Calls that are too short to be
started one by one are compiled into one program.
"""
import dataclasses
import math
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

COLD = 2 ** 28         # bytes that are read between two uses of the same arguments: several times any level 2 cache
SHORT = 3e-4           # seconds of a call that is compiled into a program with others; starting a program takes some 3e-5
ROOM = 2 ** 34         # bytes that copies of arguments may take
ROUND = {'cpu': 0.0}   # platform -> seconds of work that are started before waiting; ACCELERATOR_ROUND elsewhere
ACCELERATOR_ROUND = 2e-2


@dataclasses.dataclass(frozen=True)
class Calls:
  """start(i): starts `size` calls and returns an object to wait for. wait: waits for that object."""
  start: Callable[[int], object]
  size: int
  wait: Callable[[object], object] = jax.block_until_ready

  def seconds(self, count: int) -> float:
    """Seconds of one call, if about `count` calls are started before waiting."""
    programs = math.ceil(count / self.size)
    start = time.perf_counter()
    for i in range(programs): last = self.start(i)
    self.wait(last)
    return (time.perf_counter() - start) / (programs * self.size)


def copies(arguments: tuple) -> list[tuple]:
  """`arguments`, and copies of them in other places of memory, so many that caches hold none of them between two uses."""
  if jax.default_backend() == 'cpu': return [arguments]
  size = max(sum(leaf.nbytes for leaf in jax.tree.leaves(arguments)), 1)
  count = max(1, min(math.ceil(COLD / size) + 1, ROOM // size, 16))
  return [arguments, *(jax.tree.map(jnp.copy, arguments) for _ in range(count - 1))]


def of_function(compiled, function: Callable, sets: list[tuple]) -> Calls:
  """Calls of a function of arrays with each of `sets`. compiled: the function, compiled for the first of `sets`."""
  one = Calls(lambda i: compiled(*sets[i % len(sets)]), 1)
  one.seconds(1)   # warms up
  if jax.default_backend() == 'cpu' or min(one.seconds(8) for _ in range(2)) > SHORT: return one
  many = sets if len(sets) > 8 else sets * math.ceil(8 / len(sets))
  together = jax.jit(_one_after_the_other(function)).lower(many).compile()
  return Calls(lambda i: together(many), len(many))


def _one_after_the_other(function: Callable) -> Callable:
  """One program that calls `function` on each of many arguments. Barriers order the calls, and make XLA compute the whole
  result of each, of which the program returns only one number."""
  def program(sets):
    ends = [jnp.zeros(())]
    for arguments in sets:
      arguments, end = jax.lax.optimization_barrier((arguments, ends[-1]))
      result = jax.lax.optimization_barrier(function(*arguments))
      number = jnp.ravel(jax.tree.leaves(result)[0])[0].astype(jnp.float32)
      ends[-1:] = [end, number]
    return ends
  return program


def take_turns(candidates: dict[str, Calls], budget: float, rounds: int) -> dict[str, list[float]]:
  """Seconds of one call, by candidate. The candidates take turns, A B A B …, at most `rounds` times, and at least three
  times, also if that exceeds `budget` seconds."""
  length = ROUND.get(jax.default_backend(), ACCELERATOR_ROUND)
  counts = {name: max(1, round(length / max(calls.seconds(1), 1e-6))) for name, calls in candidates.items()}
  seconds, start = {name: [] for name in candidates}, time.perf_counter()
  for turn in range(rounds):
    if turn >= 3 and time.perf_counter() - start > budget: break
    for name, calls in candidates.items(): seconds[name].append(calls.seconds(counts[name]))
  return seconds


def median(function: Callable, *arguments, rounds: int = 5) -> float:
  """Seconds of one call: the median of `rounds`."""
  compiled = jax.jit(function).lower(*arguments).compile()
  calls = of_function(compiled, function, copies(arguments))
  return statistics.median(take_turns({'it': calls}, 0.5, rounds)['it'])
