"""`bench --ops` reports what was measured of an operation: its speed, its errors, and what could not be measured."""
import dataclasses
import functools
import importlib
import io
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rich.console

from efficient_lm.benches import ceilings, libraries, op_report, op_speed, ops, timer, tuning
from efficient_lm.errors import ConfigError
from efficient_lm.ops import dispatch

SIZE = 16


@dataclasses.dataclass(frozen=True)
class Case:
  """y = x @ x, as a case of an operation that is defined here."""
  name: str = 'square'
  flops: float = 2. * SIZE ** 3
  bytes: float = 8. * SIZE ** 2
  precision: str = 'float32'
  tolerance: float = 1e-5

  def arguments(self): return (jax.random.normal(jax.random.key(0), (SIZE, SIZE)), None)

  def call(self, implementation, tiles=None):
    options = {} if tiles is None else {'tiles': tiles}
    return lambda x, nothing: dispatch.run('square', IMPLEMENTATIONS, implementation, x, **options)

  def baselines(self):
    return {'einsum': lambda x, nothing: jnp.einsum('ij,jk->ik', x, x), 'xla': lambda x, nothing: 2 * (x @ (x / 2))}


def kernel(x, tiles=1):
  if tiles == 3: raise RuntimeError('too large')
  return x @ x + (1. if tiles == 2 else 0.)


def broken(x): raise RuntimeError('the compiler fell over\nat length')


IMPLEMENTATIONS = {
  'hopper': dispatch.Implementation(kernel, on=('hopper',)),
  'refuses': dispatch.Implementation(kernel, refuses=lambda x: 'x is square'),
  'kernel': dispatch.Implementation(kernel, on=('cpu',), auto=()),
  'broken': dispatch.Implementation(broken),
  'wrong': dispatch.Implementation(lambda x: x @ x + 1),
  'xla': dispatch.Implementation(lambda x: x @ x),
  'reference': dispatch.Implementation(lambda x: jnp.matmul(x, x, precision='highest')),
}
OP = ops.Op('square', IMPLEMENTATIONS, lambda platform: {'square': Case(), 'again': Case()})


@pytest.fixture(scope='module')
def row():
  return op_speed.measured(OP, 'square', Case(), 0.0, rounds=3)


def report(*rows, **more):
  return op_report.Report(**dict(hardware='a machine', load=0.0, versions={'jax': '1.2'}, date='2000-01-01',
                                 ceilings=ceilings.Ceilings({'float32': 1e12}, 1e11), rows=list(rows)) | more)


def printed(report) -> str:
  console = rich.console.Console(width=op_report.WIDTH, file=io.StringIO())
  console.print(op_report.page(report))
  return console.file.getvalue()


def test_each_way_is_timed_and_compared(row):
  by_name = {one.name: one for one in row.timings}
  assert list(by_name) == ['kernel', 'wrong', 'xla', 'einsum', 'xla, baseline'] and row.work.checked == 'reference'
  assert all(len(one.seconds) == 3 and min(one.seconds) > 0 for one in row.timings)
  assert by_name['xla'].error <= 1e-5 and by_name['wrong'].error > 0.01
  assert [one.name for one in row.timings if one.ours] == ['kernel', 'wrong', 'xla']
  assert row.baseline.name in ('einsum', 'xla, baseline')


def test_what_auto_takes_is_what_dispatch_takes(row):
  """It is the first implementation that suits the device and does not refuse. 'broken' would be chosen, and is noted."""
  with pytest.raises(RuntimeError, match='fell over'): Case().call('auto')(*Case().arguments())
  assert [one.name for one in row.timings if one.auto] == ['wrong']
  ways = {name: None for name in ('kernel', 'xla')}
  assert op_speed.chosen(OP, ways) == 'xla'


def test_refusals_and_failures_are_told_apart(row):
  assert row.notes == {'refuses': 'refused: x is square', 'broken': 'FAILED: RuntimeError: the compiler fell over'}
  assert len(row.wrong) == 2 and 'broken' in row.wrong[0] and 'wrong: error' in row.wrong[1]


def test_a_result_that_is_no_number_is_wrong():
  assert op_speed.apart(jnp.array([1., jnp.nan]), jnp.ones(2)) == jnp.inf
  assert op_speed.apart({'a': jnp.array([1., 3.])}, {'a': jnp.array([1., 4.])}) == 0.25
  assert op_speed.apart(jnp.zeros(3), jnp.zeros(3)) == 0


def test_the_page_says_all_of_it(row):
  elsewhere = ops.elsewhere({'square': OP}, dispatch.Device('cpu', 'cpu'))
  assert elsewhere == ['square, hopper: for hopper, not run here; never run on a device']
  failed = op_report.Row.failed('square', 'again', 'no memory')
  text = printed(report(row, failed, elsewhere=elsewhere, left_out=['square, last']))
  for words in ('wrong (auto)', 'einsum', 'refused: x is square', 'never run on a device', 'left out: square, last',
                'no memory', 'WRONG: square, square, wrong', '1 TFLOP/s', '100 GB/s', 'a machine', 'of roofline'):
    assert words in text, words


def test_ratios_are_those_of_the_medians():
  work = op_report.Work(flops=1e9, bytes=1e9, precision='float32', tolerance=1e-5, checked='xla')
  timed = lambda name, seconds, ours: op_report.Timing(name=name, seconds=seconds, error=0.0, ours=ours)
  row = op_report.Row(op='square', case='one', work=work, timings=[
    timed('fast', [0.02, 0.02, 9.], True), timed('xla', [0.05] * 3, True), timed('library', [0.03] * 3, False)])
  line = next(line.split() for line in printed(report(row)).splitlines() if line.strip().startswith('fast'))
  # The case has 1 GFLOP and 1 GB in 20 ms; its roofline is 1 GB at 100 GB/s, which is 10 ms.
  assert line[1:] == ['20', 'ms', '0.05', '50', '50%', '2.50', '1.50', '0e+00']
  assert 'Errors against the XLA path' in printed(report(row))


def test_files_hold_what_was_measured(row, tmp_path):
  whole = report(row, op_report.Row.failed('square', 'again', 'no memory'))
  path = op_report.write(whole, tmp_path / 'new')
  assert op_report.read(path) == whole
  assert 'einsum' in (tmp_path / 'new' / 'ops.txt').read_text()


def test_operations_take_turns_and_what_finds_no_time_is_listed():
  other = ops.Op('other', IMPLEMENTATIONS, lambda platform: {'only': Case()})
  work = op_speed.in_turn({'square': OP, 'other': other}, lambda op, name: name != 'again' or op == 'square')
  assert [(op.name, name) for op, name, _ in work] == [('square', 'square'), ('other', 'only'), ('square', 'again')]
  assert op_speed.run(work, 0.0, None) == [f'{op.name}, {name}: out of time' for op, name, _ in work]


def test_a_case_that_fails_does_not_stop_the_others():
  class NoMemory(Case):
    def arguments(self): raise MemoryError('too large')
  rows = []
  assert op_speed.run([(OP, 'bad', NoMemory()), (OP, 'square', Case())], 60.0, rows.append, rounds=3) == []
  assert rows[0].wrong and rows[0].work is None and len(rows[1].timings) == 5


def test_short_calls_are_put_into_one_program_and_none_of_them_is_dropped(monkeypatch):
  monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
  monkeypatch.setattr(timer, 'COLD', 3 * 4 * SIZE ** 2)
  arguments = (jax.random.normal(jax.random.key(0), (SIZE, SIZE)),)
  sets = timer.copies(arguments)
  assert len(sets) == 4 and len({one[0].unsafe_buffer_pointer() for one in sets}) == 4
  function = lambda x: jnp.sin(x) @ x
  calls = timer.of_function(jax.jit(function).lower(*arguments).compile(), function, sets)
  assert calls.size == 8
  np.testing.assert_allclose(calls.start(0)[1:], [function(*arguments)[0, 0]] * 8, rtol=1e-5)   # sums of sixteen
  program = jax.jit(timer._one_after_the_other(function)).lower(sets * 2).compile().as_text()
  assert len([line for line in program.splitlines() if ' dot(' in line or '__onednn$matmul' in line]) == 8
  assert calls.seconds(1) > 0


def test_calls_take_turns_and_stop_when_time_is_up():
  order = []
  calls = {name: timer.Calls(lambda i, name=name: order.append(name), 1, lambda _: None) for name in 'AB'}
  assert [len(times) for times in timer.take_turns(calls, 0.0, 9).values()] == [3, 3]
  assert order[2:] == ['A', 'B'] * 3
  assert [len(times) for times in timer.take_turns(calls, 60.0, 9).values()] == [9, 9]


def test_ceilings_are_the_best_that_was_seen():
  found = ceilings.measured({'float32', 'int8'}, quick=True)
  assert all(rate > 0 for rate in found.flops.values()) and found.bandwidth > 0
  best = ceilings.Ceilings({'a': 1.}, 5.).best(ceilings.Ceilings({'a': 2.}, 4.))
  assert best == ceilings.Ceilings({'a': 2.}, 5.)
  assert best.seconds(4., 5., 'a') == 2. and best.seconds(1., 10., 'a') == 2.


def test_tiles_that_are_wrong_or_do_not_compile_are_not_proposed(monkeypatch):
  said = []
  monkeypatch.setitem(tuning.SPACES, 'square', lambda case, platform: ('TUNED', (SIZE, platform), [1, 2, 3]))
  found = tuning.run([(OP, 'square', Case())], 60.0, said.append)
  assert [one.implementation for one in found] == ['kernel'] and found[0].tried == (1, 3)
  assert found[0].entry[:2] == ('TUNED', "(16, 'cpu')") and found[0].entry[2] in (None, '1')
  for words in ('kernel, 2: ValueError: error', 'kernel, 3: RuntimeError'): assert any(words in line for line in said)


def test_a_line_of_the_table_is_python_and_kept_as_json(tmp_path):
  found = tuning.Found(op='square', case='c', implementation='kernel', entry=('TUNED', "('a', 1)", '(2, 3)'),
                       seconds=1., default=2., tried=(5, 9))
  assert eval('{' + found.line + '\n}') == {('a', 1): (2, 3)} and '2.00 times as fast' in found.line
  assert json.loads(tuning.write([found], tmp_path).read_text())[0]['entry'][1] == "('a', 1)"


def test_a_product_of_torch_is_compared_and_timed():
  torch = pytest.importorskip('torch')
  if not hasattr(torch, '_grouped_mm'): pytest.skip('this PyTorch has no grouped product')
  case = lambda of: type('case', (), dict(of=of, dtype='bfloat16', weight=None))
  shapes = (48, 16), (2, 16, 32), (48, 32)
  x, w, g = (jax.random.normal(jax.random.key(i), shape, jnp.bfloat16) for i, shape in enumerate(shapes))
  arguments = (x, w, jnp.array([16, 32], jnp.int32), None, g)
  product = lambda x, w: jax.lax.ragged_dot(x, w, arguments[2])
  for of in ('forward', 'dgrad', 'wgrad'):
    result, calls = libraries.torch_way(libraries.torch_grouped_matmul(case(of)), [arguments])
    wanted = libraries.passes(case(of), product, x, w, g)
    assert result().shape == wanted.shape
    assert op_speed.apart(result(), wanted) <= 2 ** -7, of   # two roundings to 8 bits
    assert calls().seconds(1) > 0


@functools.cache
def every():
  return ops.every()


@pytest.mark.parametrize('name', tuning.SPACES)
def test_candidate_tiles_are_found_for_the_cases_that_are_timed(name):
  """Their type is that of the operation's own table."""
  assert name in every(), f'{name} is no operation with cases to bench: {list(every())}'
  for platform in ('gpu', 'tpu'):
    small = sorted(every()[name].bench(platform).values(), key=lambda case: case.bytes)[0]
    table, key, candidates = tuning.SPACES[name](small, platform)
    assert isinstance(getattr(importlib.import_module(f'efficient_lm.ops.{name}.tiles'), table), dict) and hash(key)
    assert candidates and all(dataclasses.is_dataclass(tiles) for tiles in candidates)


def test_every_case_to_time_states_its_work_and_tolerance():
  for op in every().values():
    for platform in ('cpu', 'gpu', 'tpu'):
      for name, case in op.bench(platform).items():
        assert case.flops > 0 and case.bytes > 0 and 0 < case.tolerance < 1, (op.name, name)
        assert case.precision in ceilings.RESULT, (op.name, name)


@pytest.mark.parametrize('only', [['grouped'], ['grouped_matmul', 'grouped'], ['attention/no such case']], ids=str)
def test_a_word_that_names_no_case_is_refused(only):
  """Also beside one that does: a typo must not leave a case out."""
  with pytest.raises(ConfigError, match=rf'--only = {only[-1]!r}: no case is named so'): op_speed.select(only)


def test_words_name_operations_and_cases():
  names = lambda *only: {op.name for op, _, _ in op_speed.select(list(only))}
  assert names('grouped_matmul', 'attention/*all') == {'grouped_matmul', 'attention'} and names() == set(every())
  assert len(op_speed.select([], quick=True)) == len(every())


def test_the_command(pytestconfig, tmp_path):
  name = next(iter(every()))
  run = subprocess.run([sys.executable, '-m', 'efficient_lm.bench', '--ops', '--quick', '--repeats=3', f'--only={name}',
                        f'--out={tmp_path}'], capture_output=True, text=True, cwd=pytestconfig.rootpath)
  assert run.returncode == 0, run.stderr
  assert [row.op for row in op_report.read(tmp_path / 'ops.json').rows] == [name]
