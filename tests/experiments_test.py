"""The experiments: what their scripts run is valid, their notebooks are stored as they are written and run from the results
beside them, and the tables of their READMEs are those of their results."""
import dataclasses
import importlib
import json
import pathlib
import re
import runpy
import subprocess

import jax
import jupytext
import pytest

from efficient_lm.config import experiment as configs
from efficient_lm.errors import ConfigError
from efficient_lm.models import spec
from efficient_lm.runs import ledger, record
from efficient_lm.training.learner import new_model
from experiments import collecting

ROOT = pathlib.Path(__file__).parent.parent
FOLDERS = sorted(file.parent for file in (ROOT / 'experiments').glob('*/collect.py'))
MEASURED = [folder for folder in FOLDERS if (folder / 'results.json').is_file()]
NOTEBOOKS = [folder for folder in MEASURED if (folder / 'notebook.py').is_file()]
name_of = lambda folder: folder.name


def script(folder, name='collect'):
  return importlib.import_module(f'experiments.{folder.name}.{name}')


def results_of(folder):
  return json.loads((folder / 'results.json').read_text())


def commands(folder, tmp_path, monkeypatch, **environment) -> dict[str, list[str]]:
  """The words of every command that run.sh gives, by the name of its run, in a folder of its own."""
  program, said = tmp_path / 'bin' / 'python', tmp_path / 'said'
  program.parent.mkdir()
  program.write_text(f'#!/bin/sh\n(printf "%s\\t" "$@"; echo) >> {said}\n')
  program.chmod(0o755)
  path = f'{program.parent}:/usr/bin:/bin'
  subprocess.run(['bash', folder / 'run.sh'], cwd=tmp_path, env={'PATH': path, **environment}, check=True)
  monkeypatch.chdir(tmp_path)
  lines = [line.split('\t')[:-1] for line in said.read_text().splitlines()]
  assert all(line[:2] == ['-m', 'efficient_lm.main'] for line in lines)
  return {word.rpartition('/')[2]: line[2:] for line in lines for word in line if word.startswith('--workdir=')}


def load(words: list[str]) -> configs.Experiment:
  """The experiment of a command, kept as far as those that start from it, or learn from it, can see."""
  flags = dict(word.removeprefix('--').split('=', 1) for word in words)
  overrides = [word for word in words if word.startswith('--config.')]
  experiment, _ = configs.load(str(ROOT / flags['config']), overrides)
  workdir = pathlib.Path(flags['workdir'])
  workdir.mkdir(parents=True)
  configs.write(str(workdir), experiment)
  return experiment


def leave(workdir, rows, stages=('train',)):
  """The files of a run that has come to the end of `rows`, of the stages planned."""
  workdir.mkdir()
  plan = tuple(record.Planned(f'{i}_{name}', f'{i} {name}', f'key {i}') for i, name in enumerate(stages, 1))
  for planned, _ in zip(plan, rows):
    manifest = record.stage_folder(workdir, planned) / '10' / record.MANIFEST
    manifest.parent.mkdir(parents=True)
    left = {'key': planned.key, 'weights': []}
    manifest.write_text(json.dumps({'record': left, 'record_crc32': record.crc32(left)}))
  record.write(workdir, record.Record({}, 'bytes', None, {}, plan))
  ledger.write(workdir, rows)
  steps = [{'step': step, 'eval/bits_per_byte': 9 - step} for step in (5, 10)]
  (workdir / 'metrics.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in steps))
  (workdir / 'config.json').write_text(json.dumps({'train': {'steps': 10, 'batch_size': 2, 'sequence_length': 8}}))


def row(bits: float, seed: int = 0, hardware: str = 'a laptop') -> ledger.Row:
  size = ledger.Size(parameters=1000, nonzero_parameters=500, active_parameters=1000, bytes_on_disk=1024,
                     bytes_in_memory=2048, flops_per_token=2000)
  return ledger.Row(stage='train', quality=ledger.Quality(bits_per_byte=bits, baselines={'xz': 1.8}), size=size,
                    origin=ledger.Origin(hardware=hardware, versions={'jax': '1'}, corpus_hash='text', seed=seed))


@pytest.mark.parametrize('folder', MEASURED, ids=name_of)
def test_the_table_of_a_readme_is_that_of_the_results(folder):
  assert script(folder).table(results_of(folder)) in (folder / 'README.md').read_text()


@pytest.mark.parametrize('folder', NOTEBOOKS, ids=name_of)
def test_a_stored_notebook_is_the_written_one_and_has_been_run(folder):
  written, stored = (jupytext.read(folder / f'notebook.{suffix}') for suffix in ('py', 'ipynb'))
  cells = lambda notebook: [(cell.cell_type, cell.source) for cell in notebook.cells]
  assert cells(stored) == cells(written)
  assert all(cell.execution_count for cell in stored.cells if cell.cell_type == 'code')


@pytest.mark.filterwarnings('ignore:FigureCanvasAgg is non-interactive')
@pytest.mark.parametrize('folder', NOTEBOOKS, ids=name_of)
def test_a_notebook_runs_from_the_results_beside_it(folder, monkeypatch, capsys):
  monkeypatch.setenv('MPLBACKEND', 'agg')
  monkeypatch.chdir(folder)
  runpy.run_path('notebook.py')
  assert results_of(folder)['hardware'] in capsys.readouterr().out


def test_every_run_of_the_quantization_table_is_valid_and_has_a_row(tmp_path, monkeypatch):
  folder = ROOT / 'experiments' / 'quantization'
  found = commands(folder, tmp_path, monkeypatch)
  named = lambda row: '-'.join([row['method'], *([] if row['bits'] == '32' else [row['bits']]), str(row['seed'])])
  assert sorted(found) == sorted(named(row) for row in results_of(folder)['rows'])
  assert f'{len(found)} runs' in (folder / 'README.md').read_text()
  for name, words in found.items():
    experiment = load(words)
    assert experiment.seed == int(name.rpartition('-')[2])
    assert (experiment.train.steps == 0) == (not name.startswith(('float', 'more', 'qat')))


def test_every_run_of_the_pillars_table_is_valid_and_starts_from_its_own_baseline(tmp_path, monkeypatch):
  folder = ROOT / 'experiments' / 'pillars'
  found = commands(folder, tmp_path, monkeypatch, SEEDS='0 3')
  assert set(found) == {f'{name}-{seed}' for name in script(folder).NAMES for seed in (0, 3)}
  for name, words in found.items():
    experiment, seed = load(words), int(name.rpartition('-')[2])
    assert experiment.seed == seed
    assert {source.path for _, source in configs.sources(experiment)} <= {f'runs/pillars/baseline-{seed}'}


@pytest.mark.parametrize('name', ['sparsity', 'shapes'])
def test_every_run_of_what_is_pruned_is_valid_and_starts_from_the_model_of_its_own_seed(tmp_path, monkeypatch, name):
  folder = ROOT / 'experiments' / name
  found = commands(folder, tmp_path, monkeypatch, SEEDS='0 3')
  assert set(found) == {f'{name}-{seed}' for name in script(folder).NAMES for seed in (0, 3)}
  for run, words in found.items():
    experiment, seed = load(words), int(run.rpartition('-')[2])
    assert experiment.seed == seed
    whole = {f'runs/{name}/{of}-{seed}' for of in (('mixture',) if 'experts' in run else ('dense',))}
    starts = {source.path for _, source in configs.sources(experiment)}
    assert starts == (set() if run.startswith(('dense', 'mixture')) or 'scratch' in run else whole)


def test_shapes_are_collected_with_what_was_left_before_they_recovered(tmp_path):
  folder = ROOT / 'experiments' / 'shapes'
  for name in script(folder).NAMES:
    for seed in (0, 1):
      rows = [dataclasses.replace(row(1.5 + seed / 8, seed), stage='1 train')]
      if name in ('width', 'depth', 'experts_75', 'experts_50'):
        rows = [dataclasses.replace(row(bits + seed / 8, seed), stage=stage)
                for stage, bits in (('1 shrink', 3), ('2 train', 1.5), ('3 skipexperts', 1.625))]
      leave(tmp_path / f'{name}-{seed}', rows, [one.stage.partition(' ')[2] for one in rows])
  found = script(folder).collect(tmp_path)
  assert len(found['rows']) == 2 * len(script(folder).NAMES)
  assert [one['skipping'] for one in found['rows'] if one['name'] == 'experts_50'] == [1.625, 1.75]
  lines = script(folder).table(found).splitlines()
  assert '| dense | 1 k | 2 k | 160 |  | 1.5000, 1.6250 | 1.5625 |' in lines
  assert '| half of the experts, recovered | 1 k | 2 k | 160 | 3.062 | 1.5000, 1.6250 | 1.5625 |' in lines


def test_pillars_are_collected_tabled_and_drawn(tmp_path):
  """Of the rows of two seeds; of several stages the last."""
  folder = ROOT / 'experiments' / 'pillars'
  collect = script(folder)
  for name in collect.NAMES:
    for seed in (0, 1):
      leave(tmp_path / f'{name}-{seed}', [row(3, seed), row(1.5 + seed / 8, seed)], ('train', 'convert'))
  found = collect.collect(tmp_path)
  assert len(found['rows']) == 2 * len(collect.NAMES) and found['hardware'] == 'a laptop'
  line = '| dense baseline | 10 | 1.5000, 1.6250 | 1 k | 500 | 1 k | 2 KiB | 1 KiB | 2 k |'
  assert line in collect.table(found).splitlines()
  readme = (folder / 'README.md').read_text()
  assert len(re.findall(r'(?:^\|.*\n)+', readme, re.M)) == 1, 'one table, which collect.py replaces'
  assert collect.table(found).splitlines()[0] in readme
  collect.draw(found, tmp_path / 'pillars.png')
  assert (tmp_path / 'pillars.png').read_bytes().startswith(b'\x89PNG')


def test_the_curve_of_a_run_is_collected(tmp_path):
  for name in ('baseline-0', 'moe-0'):
    leave(tmp_path / name, [row(1.5)])
  rows = script(ROOT / 'experiments' / 'dense_or_mixture').collect(tmp_path)['rows']
  assert [(one['model'], one['tokens'], one['curve']) for one in rows] == [
    (name, 160, [[5, 4.0], [10, -1.0]]) for name in ('baseline', 'moe')]


def test_a_run_that_has_not_come_to_its_end_is_refused(tmp_path):
  leave(tmp_path / 'one', [row(1.5)], ('train', 'convert'))
  with pytest.raises(ConfigError, match='has not come to its stage 2 convert'): collecting.finished(tmp_path)


def test_runs_of_two_machines_make_no_table(tmp_path):
  for name, hardware in (('one', 'a laptop'), ('two', 'a desktop')):
    leave(tmp_path / name, [row(1.5, hardware=hardware)])
  with pytest.raises(ConfigError, match=r'two.*another machine'): collecting.in_common(collecting.finished(tmp_path))


def test_the_timing_of_gptq_runs_on_a_small_model(capsys):
  timing = script(ROOT / 'experiments' / 'quantization', 'gptq_124m')
  stack = spec.Stack(num_layers=1, attention=spec.GroupedQuery(num_heads=2, num_kv_heads=1, head_dim=64),
                     mlp=spec.SwiGLU(hidden=128))
  small = spec.Transformer(vocab_size=32, dim=128, stacks=(stack,))
  timing.timed(new_model(small, jax.random.key(0)), timing.RandomText(32, length=8), rows=8)
  assert 'of the bytes of float32' in capsys.readouterr().out


def test_rows_are_written_one_by_one_and_those_that_stand_are_kept(tmp_path):
  (tmp_path / 'README.md').write_text('# A table\n\n| |\n| --- |\n', encoding='utf-8')
  head = {'date': '2026-01-01', 'hardware': 'a CPU'}
  def measured(name):
    if name == 'broken': raise RuntimeError
    return {'of': name}
  table = lambda found: collecting.markdown(['row'], [[row['of']] for row in found['rows'].values()])
  variants = dict.fromkeys(['b', 'broken', 'a'])
  collect = lambda names, head=head: collecting.row_by_row(tmp_path, head, variants, names, measured, table)
  with pytest.raises(RuntimeError): collect([])
  assert list(collect(['a'])['rows']) == ['b', 'a'], 'in the order of the table'
  assert collecting.read(tmp_path)['rows'] == {'b': {'of': 'b'}, 'a': {'of': 'a'}}
  assert (tmp_path / 'README.md').read_text(encoding='utf-8') == '# A table\n\n| row |\n| --- |\n| b |\n| a |\n'
  with pytest.raises(SystemExit, match='another hardware'): collect(['a'], head | {'hardware': 'another CPU'})
