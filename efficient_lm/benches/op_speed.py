"""Times the cases of an operation: every implementation that runs on this device, in turns with the baselines."""
import dataclasses
import fnmatch
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

from efficient_lm.benches import libraries, ops, timer
from efficient_lm.benches.op_report import Row, Timing, Work
from efficient_lm.errors import ConfigError
from efficient_lm.ops import dispatch

ROUNDS = 15
REFUSALS = ('cannot take this: ', ' has no implementation ')


@dataclasses.dataclass(frozen=True)
class Way:
  """One way to compute a case. result: computes it, or None where the result cannot be compared. calls: returns the calls to
  be timed."""
  result: Callable[[], object] | None
  calls: Callable[[], timer.Calls]


@jax.jit
def apart(got, wanted):
  """The largest difference of two trees of arrays; that of each array is relative to its largest number in `wanted`."""
  def one(got, wanted):
    got, wanted = got.astype(jnp.float32), wanted.astype(jnp.float32)
    largest = jnp.max(jnp.abs(wanted), initial=0)
    difference = jnp.max(jnp.abs(got - wanted), initial=0) / jnp.where(largest > 0, largest, 1)
    return jnp.where(jnp.isnan(difference), jnp.inf, difference)
  return jnp.max(jnp.array([one(*pair) for pair in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True)]))


def brief(error: Exception) -> str:
  """An error in one line."""
  return f'{type(error).__name__}: {str(error).strip().splitlines()[0][:200] if str(error).strip() else ""}'


def fits(compiled) -> bool:
  """Whether the program fits into the free memory of the device; True where devices do not report it."""
  stats, memory = jax.devices()[0].memory_stats() or {}, compiled.memory_analysis()
  if 'bytes_limit' not in stats or memory is None: return True
  return memory.temp_size_in_bytes + memory.output_size_in_bytes < 0.9 * (stats['bytes_limit'] - stats['bytes_in_use'])


def expected(case, arguments) -> tuple[object, str]:
  """The expected result and the implementation that computed it: the reference in float32 arithmetic, or 'xla' where the
  reference needs too much memory."""
  with jax.default_matmul_precision('highest'):
    for name in (ops.REFERENCE, 'xla'):
      compiled = jax.jit(case.call(name)).lower(*arguments).compile()
      if fits(compiled): return jax.block_until_ready(compiled(*arguments)), name
  raise MemoryError('neither the reference nor the XLA path fits into the memory of this device')


def way(function: Callable, arguments: tuple, sets: list, comparable: bool = True) -> Way:
  """A function of arrays, compiled for `arguments`."""
  compiled = jax.jit(function).lower(*arguments).compile()
  return Way((lambda: compiled(*arguments)) if comparable else None, lambda: timer.of_function(compiled, function, sets))


def implementations(op: ops.Op, case, arguments, sets) -> tuple[dict[str, Way], dict[str, str]]:
  """The implementations that run here and take the case, and notes why others do not: a refusal or an error."""
  ways, notes, here = {}, {}, dispatch.device()
  for name, one in op.implementations.items():
    if name == ops.REFERENCE or not ops.suits(one, here): continue
    try: ways[name] = way(case.call(name), arguments, sets)
    except Exception as error:   # Compilers raise many kinds of errors; the other implementations are measured nevertheless.
      refused = isinstance(error, ValueError) and any(words in str(error) for words in REFUSALS)
      notes[name] = f'refused: {str(error).rpartition(REFUSALS[0])[2]}' if refused else f'FAILED: {brief(error)}'
  return ways, notes


def chosen(op: ops.Op, ways) -> str | None:
  """The name of the implementation that 'auto' chooses among `ways`."""
  here = dispatch.device()
  return next((name for name, one in op.implementations.items() if name in ways and ops.suits(one, here, auto=True)), None)


def baselines(op: ops.Op, case, arguments, sets) -> tuple[dict[str, Way], dict[str, str]]:
  """The baselines of the case and of installed libraries, and notes of errors."""
  ways, notes = {}, {}
  makers = {name: lambda function=function: way(function, arguments, sets) for name, function in case.baselines().items()}
  if hasattr(case, 'unquantized'): makers['unquantized'] = lambda: _unquantized(case)
  for name, (function, comparable) in libraries.functions(op.name, case).items():
    makers[name] = lambda function=function, comparable=comparable: way(function, arguments, sets, comparable)
  for name, rival in libraries.torch_functions(op.name, case).items():
    makers[name] = lambda rival=rival: Way(*libraries.torch_way(rival, sets))
  for name, make in makers.items():
    if name in op.implementations: name = f'{name}, baseline'
    # A failing baseline is no failure of the operation.
    try: ways[name] = make()
    except Exception as error: notes[name] = f'not timed: {brief(error)}'
  return ways, notes


def _unquantized(case) -> Way:
  arguments, function = case.unquantized()
  # The results differ by the error of quantization, so that they are not compared.
  return way(function, arguments, timer.copies(arguments), comparable=False)


def measured(op: ops.Op, name: str, case, budget: float, rounds: int = ROUNDS) -> Row:
  """Times the case in about `budget` seconds, without compilation."""
  arguments = jax.block_until_ready(case.arguments())
  wanted, checked = expected(case, arguments)
  sets = timer.copies(arguments)
  ours, notes = implementations(op, case, arguments, sets)
  others, trouble = baselines(op, case, arguments, sets)
  errors, calls = {}, {}
  for label, one in (ours | others).items():
    try:
      errors[label] = float(apart(one.result(), wanted)) if one.result else None
      calls[label] = one.calls()
    except Exception as error: (notes if label in ours else trouble)[label] = f'FAILED: {brief(error)}'
  del wanted
  seconds = timer.take_turns(calls, budget, rounds)
  taken = chosen(op, ours)
  timings = [Timing(name=label, seconds=times, error=errors[label], ours=label in ours, auto=label == taken)
             for label, times in seconds.items()]
  work = Work(flops=case.flops, bytes=case.bytes, precision=case.precision, tolerance=case.tolerance, checked=checked)
  return Row(op=op.name, case=name, work=work, timings=timings, notes=notes | trouble)


def alive() -> bool:
  """Whether the device still computes; after a fault in a kernel it may not."""
  try: return float(jax.jit(lambda x: x + 1)(jnp.ones(()))) == 2
  except Exception: return False


def in_turn(operations: dict[str, ops.Op], selected: Callable[[str, str], bool]) -> list[tuple[ops.Op, str, object]]:
  """(operation, name, case): the first case of each operation, then the second of each …, so that every operation has some
  results when time runs out."""
  platform = jax.default_backend()
  lists = [[(op, name, case) for name, case in op.bench(platform).items() if selected(op.name, name)]
           for op in operations.values()]
  return [some[i] for i in range(max(map(len, lists), default=0)) for some in lists if i < len(some)]


def select(only: list[str], quick: bool = False) -> list[tuple[ops.Op, str, object]]:
  """The cases that `only` names, as `in_turn` orders them; of each operation the first one where `quick`.

  only: 'OP' or 'OP/CASE', where * stands for anything; without words, all cases. Raises ConfigError for a word that names
    none.
  """
  patterns = {word: word if '/' in word else f'{word}/*' for word in only or ['*']}
  operations = ops.every()
  work = in_turn(operations, lambda op, name: any(fnmatch.fnmatchcase(f'{op}/{name}', one) for one in patterns.values()))
  for word, pattern in patterns.items():
    if not any(fnmatch.fnmatchcase(f'{op.name}/{name}', pattern) for op, name, _ in work):
      raise ConfigError('--only', word, f'no case is named so: there are {", ".join(operations)}, and OP/CASE')
  return list({op.name: (op, name, case) for op, name, case in reversed(work)}.values())[::-1] if quick else work


def run(work: list, budget: float, done: Callable[[Row], None], rounds: int = ROUNDS) -> list[str]:
  """Measures cases one after another and calls done(row) after each. Returns a line for each case that was left out, because
  time ran out or the device stopped computing. A case is timed for a third of its share of the remaining time; the rest is
  left for compilation."""
  end = time.monotonic() + budget
  for i, (op, name, case) in enumerate(work):
    left = end - time.monotonic()
    if left <= 0: return [f'{op.name}, {name}: out of time' for op, name, _ in work[i:]]
    try: row = measured(op, name, case, left / (len(work) - i) / 3, rounds)
    except Exception as error: row = Row.failed(op.name, name, brief(error))
    done(row)
    jax.clear_caches()
    if not alive(): return [f'{op.name}, {name}: the device has stopped computing' for op, name, _ in work[i + 1:]]
  return []
