"""A baseline must compute the same as the case; the page and the files show what was measured."""
import dataclasses
import json
import subprocess
import sys

import pytest
import rich.console

from efficient_lm.benches import models, result

B, T = 2, 32


def row(**changes):
  """Ours takes 2 s, one baseline 4 or 5 s, another 8 s."""
  seconds = {result.OURS: [2.0, 2.0, 2.0], 'slow': [8.0, 8.0, 8.0], 'quick': [4.0, 4.0, 5.0]}
  fields = dict(name='case', seconds=seconds, processor=seconds, flops=1e9, tokens=100, target=2.0)
  return result.Row(**fields | changes)


def report(*rows, **changes):
  fields = dict(hardware='a machine', load=0.1, versions={'jax': '1.2'}, date='2000-01-01', peak_flops=2e9,
                quick=False)
  return result.Report(**fields | changes, rows=list(rows))


def printed(report) -> str:
  console = rich.console.Console(width=110)
  with console.capture() as capture: console.print(result.page(report))
  return capture.get()


def timed(case, name='case'):
  return result.measured(name, case, 1)


@pytest.fixture(autouse=True, scope='module')
def built_once():
  """Models are initialised once for each spec, because compiling the initialisation takes longer than all else here."""
  with pytest.MonkeyPatch.context() as patch:
    drawn, new_model = {}, models.new_model
    patch.setattr(models, 'new_model', lambda spec, key: drawn.get(repr(spec)) or drawn.setdefault(
      repr(spec), new_model(spec, key)))
    yield


@pytest.fixture
def baselines():
  pytest.importorskip('transformers')
  pytest.importorskip('torch').set_num_threads(1)   # two threads would wait for each other: there is too little work


@pytest.mark.parametrize('document', [None, 8])
def test_pytorch_trains_a_dense_model_as_we_do(baselines, document):
  spec = models.little()
  batch = models.random_batch(spec, B, T, document)
  assert (batch['segments_BT'].max() > 1) == (document is not None)
  case = models.train_step(spec, batch)   # raises unless the losses of all steps agree
  assert len(case.candidates) == 3 and case.tokens == B * T and case.flops > 0
  assert 'losses of 4 steps' in case.agreement
  assert timed(case).ratio > 0


def test_mixtral_of_transformers_trains_as_we_do(baselines):
  spec = models.little(models.mixture(4, 32))
  case = models.train_step(spec, models.random_batch(spec, B, T))
  assert [name for name in case.candidates if 'Mixtral' in name] == list(case.candidates)[1:]
  assert len(case.candidates) == 3


def test_llama_of_transformers_generates_the_same_tokens(baselines):
  assert models.decoding(models.little(), 5, 12).agreement == '12 of 12 tokens are the same'


def test_a_baseline_with_another_loss_is_refused(baselines, monkeypatch):
  monkeypatch.setattr(models, 'our_trainer', lambda *arguments: lambda: 1.0)
  spec = models.little()
  batch = models.random_batch(spec, B, T)
  with pytest.raises(result.Disagreement, match='losses'): models.train_step(spec, batch)


def test_a_missing_baseline_is_said(monkeypatch):
  monkeypatch.setattr(models, 'installed', lambda: False)
  monkeypatch.setattr(models, 'our_trainer', lambda *arguments: lambda: 1.0)
  spec = models.little()
  rows = [timed(models.train_step(spec, models.random_batch(spec, B, T)), 'train'),
          timed(models.decoding(spec, 4, 4), 'decode')]
  assert all(row.baseline is None and row.ratio is None for row in rows)
  assert printed(report(*rows)).count('pip install efficient_lm[bench]') == 2


@pytest.mark.parametrize('ours', [[1.0, 2.1], [1.0, float('nan')]])
def test_differences_above_rounding_are_refused(ours):
  with pytest.raises(result.Disagreement, match='losses'): result.difference('losses', ours, [1.0, 2.0], 1e-2)
  assert result.difference('losses', [1.0, 2.0], [1.0, 2.0], 1e-2) == 0


def test_candidates_take_turns():
  order, said = [], []
  candidates = {name: lambda name=name: order.append(name) for name in ('ours', 'theirs')}
  case = result.Case(candidates=candidates, flops=1.0)
  wall, processor = result.take_turns(case, 2, said.append)
  assert order == ['ours', 'theirs'] * 3
  assert {name: len(times) for name, times in wall.items()} == dict(ours=2, theirs=2) == {
    name: len(times) for name, times in processor.items()}
  assert said[0] == 'warming up, ours' and said[-1] == 'turn 2 of 2, theirs'


def test_the_ratio_is_the_median_over_turns_against_the_fastest():
  assert row().baseline == 'quick' and row().ratio == 2.0 and row().ours == 2.0


def test_the_page_shows_figures_target_and_origin():
  text = printed(report(row(), row(name='other', tokens=None, target=3.0, agreement='losses equal')))
  for word in ('case', 'quick', '2.00', '50 tokens', '500 MFLOP', '25%', 'losses equal'): assert word in text
  assert 'a machine' in text and 'jax 1.2' in text and '2000-01-01' in text and '2 GFLOP/s' in text
  assert '3 missed' in text and '2 missed' not in text


def test_small_sizes_and_a_busy_machine_are_said():
  assert 'SMALL SIZES' in printed(report(row(target=9.0), quick=True))
  assert 'missed' not in printed(report(row(target=9.0), quick=True))
  assert 'BUSY MACHINE' in printed(report(row(), load=3.0)) and 'BUSY' not in printed(report(row()))


def test_files_hold_what_was_measured(tmp_path):
  alone = row(name='alone', seconds={result.OURS: [1.0]}, processor={result.OURS: [1.0]}, target=None)
  whole = report(row(), alone)
  path = result.write(whole, tmp_path / 'new')
  assert result.read(path) == whole
  assert json.loads(path.read_text())['rows'] == [dataclasses.asdict(row) for row in whole.rows]
  assert result.MISSING in (tmp_path / 'new' / 'bench.txt').read_text()


@pytest.fixture
def command(pytestconfig):
  """Runs the command in a separate process, from the root of the repository."""
  def run(*words):
    words = [sys.executable, '-m', 'efficient_lm.bench', *words]
    return subprocess.run(words, capture_output=True, text=True, cwd=pytestconfig.rootpath)
  return run


def test_the_command(command, tmp_path):
  names = ['decode', 'prefill_int8', 'prefill_blocks_75', 'prefill_half_width', 'decode_int4_1', 'decode_int4_8_experts',
           'import']
  run = command('--quick', f'--only={",".join(names)}', '--repeats=1', f'--out={tmp_path}')
  assert run.returncode == 0, run.stderr
  assert [row.name for row in result.read(tmp_path / 'bench.json').rows] == names


@pytest.mark.parametrize('word, said', [('--only=dense', 'dense_train'), ('--repeats=0', 'at least 1')])
def test_a_mistake_is_one_line(command, word, said):
  run = command(word)
  assert run.returncode == 2 and said in run.stderr and len(run.stderr.splitlines()) == 1


@pytest.mark.parametrize('words', [['--only=dense'], ['--ops', '--repeats=0'], ['--unknown']], ids=str)
def test_a_mistake_is_answered_before_jax_is_loaded(pytestconfig, words):
  code = ('import sys\nfrom efficient_lm import bench, commands\nsys.argv = ["bench", *sys.argv[1:]]\n'
          'code = commands.exit_code(bench.main, sys.argv)\n'
          'print(code, sorted({"jax", "jaxlib", "flax", "optax", "orbax", "torch"} & set(sys.modules)))')
  run = subprocess.run([sys.executable, '-c', code, *words], capture_output=True, text=True, cwd=pytestconfig.rootpath)
  assert run.stdout == '2 []\n', run.stdout + run.stderr


def test_help_names_the_cases(command):
  run = command('--help')
  assert run.returncode == 0 and 'dense_train_packed' in run.stdout and '--autotune' in run.stdout
