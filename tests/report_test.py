"""A report comes out of whatever a run has written, loads nothing from elsewhere, and treats text as text."""
import json
import os
import re
import subprocess
import sys
import time
import xml.etree.ElementTree

import numpy as np
import pytest
from matplotlib.figure import Figure

from efficient_lm.runs import charts, ledger, report_page, results
from efficient_lm.runs.ledger import Origin, Quality, Row, Size
from efficient_lm.runs.tracking import Tracker


def make_run(folder, bits=1.5, nbytes=100):
  tracker = Tracker(folder)
  for step in range(1, 300):
    tracker.scalars(step, {'loss': np.nan if step == 50 else 3 + 1 / step, 'grad_norm': 1.0,
                           'load': np.ones((2, 4)).tolist()})
    if step % 100 == 0: tracker.scalars(step, {'eval/bits_per_byte': bits + 1 / step})
  tracker.close()
  ledger.write(folder, [Row(
    stage=stage, notes=(f'{stage} reaches all',),
    quality=Quality(bits_per_byte=bits + share / 100, baselines={'xz': 2.0, 'order-3': 1.75}),
    size=Size(parameters=100, active_parameters=50, bytes_in_memory=nbytes // share, flops_per_token=2.0 * nbytes),
    origin=Origin(hardware='a <fast> machine', seed=0)) for stage, share in (('train', 1), ('quantize', 4))])
  (folder / 'samples').mkdir()
  (folder / 'samples' / '00000299.txt').write_text('if a < b: <script>alert(1)</script>')
  (folder / 'stages' / '1_quantize').mkdir(parents=True)
  (folder / 'stages' / '1_quantize' / 'weights.json').write_text(json.dumps([
    {'path': 'mlp/up', 'kind': 'int4 per <group>', 'product': 'float x int4', 'num_bytes': 2048, 'float_bytes': 16384}]))
  (folder / 'config.json').write_text(json.dumps({'train': {'steps': 300}, 'note': '</pre>'}))
  return folder


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
  folder = tmp_path_factory.mktemp('runs')
  return [make_run(folder / 'moe'), make_run(folder / 'dense', 1.6, 400)]


@pytest.fixture(scope='module')
def page(runs):
  return report_page.write_report(runs[0]).read_text()


def test_the_page_shows_quality_baselines_cost_load_sample_and_config(page, runs):
  for part in ('bits per byte', 'xz 2.000', 'order-3 1.750', 'training loss', 'held-out text', 'quantize', 'Expert load',
               'Sample', 'Configuration', 'a &lt;fast&gt; machine', 'not finite', 'Weights after 1 quantize',
               '<th>mlp/up</th>', 'int4 per &lt;group&gt;', '2 KiB', '0.125'):
    assert part in page, part
  assert (runs[0] / 'report.png').read_bytes().startswith(b'\x89PNG')


def test_the_page_loads_nothing_from_anywhere(page):
  assert not re.search(r'(src|href)="(?!#|data:)', page) and '@import' not in page and '<link' not in page


def test_what_a_model_or_a_config_writes_stays_text(page):
  assert '<script' not in page and '&lt;script&gt;' in page and '&lt;/pre&gt;' in page


def test_the_pictures_are_well_formed(page):
  pictures = re.findall(r'<svg.*?</svg>', page, re.DOTALL)
  assert len(pictures) >= 3
  for picture in pictures: xml.etree.ElementTree.fromstring(picture)


def test_several_runs_share_their_pictures_and_name_their_rows(runs, tmp_path):
  page = report_page.write(results.load_all(runs), tmp_path / 'out').read_text()
  for part in ('moe / quantize', 'dense / train', 'quality against bytes in memory', 'Sample: dense',
               'moe / quantize, dense / quantize: quantize reaches all'): assert part in page


def test_runs_of_one_name_are_told_apart_by_as_much_of_their_paths_as_that_takes(tmp_path):
  folders = [make_run(tmp_path / name) for name in ('exp1/moe', 'exp2/moe', 'exp2/dense', 'exp1/deep/moe')]
  assert [found.name for found in results.load_all(folders)] == ['exp1/moe', 'exp2/moe', 'dense', 'deep/moe']
  assert len(results.labelled(results.load_all(folders))) == 8, 'a row of each stage of each run'
  done, _ = command(*folders[:2], '--out', tmp_path)
  assert 'exp1/moe' in done.stdout and 'exp2/moe' in done.stdout


def test_brackets_in_a_name_are_shown_as_they_are(tmp_path):
  """They are markup where text is not kept apart from it, and eaten, or an error."""
  folders = [make_run(tmp_path / name) for name in ('moe[lr=1e-2]', 'x[b]')]
  done, _ = command(*folders, '--out', tmp_path / 'out[/b]')
  assert done.returncode == 0, done.stderr
  for name in ('moe[lr=1e-2]', 'x[b]', 'out[/b]'): assert name in done.stdout
  assert 'moe[lr=1e-2]' in (tmp_path / 'out[/b]' / 'report.html').read_text()


@pytest.mark.parametrize('left', [['config.json'], ['metrics.jsonl'], ['ledger.json'], ['samples', 'config.json']])
def test_a_report_makes_do_with_what_there_is(tmp_path, left):
  run = make_run(tmp_path / 'run')
  for name in ('config.json', 'metrics.jsonl', 'ledger.json', 'samples'):
    if name not in left: (run / name).rename(tmp_path / name)
  assert '<h1>run</h1>' in report_page.write_report(run).read_text()


@pytest.mark.parametrize('values', [[], [np.nan], [1.0], [np.nan] * 60, [2.0] * 60, [np.inf, 1.0, 2.0]])
def test_no_curve_is_too_odd_to_draw(tmp_path, values):
  tracker = Tracker(tmp_path)
  for step, value in enumerate(values):
    tracker.scalars(step, {'loss': value, 'eval/bits_per_byte': value, 'grad_norm': value})
  tracker.close()
  assert '<h1>' in report_page.write_report(tmp_path).read_text()


def test_stages_are_drawn_apart_and_their_times_are_added(tmp_path):
  """Between two trainings the model may have been pruned, and the loss be another."""
  tracker = Tracker(tmp_path)
  for step in range(1, 9):
    tracker.scalars(step, {'stage': 1 if step < 5 else 3, 'loss': 9.0 - step, 'eval/bits_per_byte': 2.0, 'grad_norm': 1.0})
  tracker.close()
  ledger.write(tmp_path, [Row(stage=name, effort=ledger.Effort(wall_seconds=seconds))
                          for name, seconds in (('1 train', 60.0), ('2 pruneonce', None), ('3 train', 30.0))])
  found = results.load(tmp_path)
  assert [list(steps) for steps, _ in found.curves('loss')] == [[1, 2, 3, 4], [5, 6, 7, 8]]
  assert list(found.curve('loss')[0]) == list(range(1, 9))
  assert '<b>1 min 30 s</b>' in report_page.page([found])
  for draw in (lambda plot: charts.draw_loss(plot, {'run': found.curves('loss')}),
               lambda plot: charts.draw_eval(plot, {'run': found.curves('eval/bits_per_byte')}, {}),
               lambda plot: charts.draw_series(plot, 'name', found.curves('grad_norm'))):
    plot = Figure().add_subplot()
    draw(plot)
    assert all(len({step < 5 for step in line.get_xdata()}) == 1 for line in plot.lines)


def command(*arguments):
  start = time.perf_counter()
  done = subprocess.run([sys.executable, '-m', 'efficient_lm.report', *map(str, arguments)], capture_output=True, text=True,
                        env={**os.environ, 'COLUMNS': '160'})
  return done, time.perf_counter() - start


def test_a_folder_that_is_no_run_is_one_line_and_exit_code_2(tmp_path, runs):
  for folder in (tmp_path, tmp_path / 'missing'):
    done, _ = command(runs[0], folder, '--out', tmp_path / 'out')
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and str(folder) in done.stderr
  assert not (tmp_path / 'out').exists()


def test_a_damaged_config_or_ledger_is_one_line(tmp_path):
  for name in ('config.json', 'ledger.json'):
    (tmp_path / name).write_text('{"torn')
    done, _ = command(tmp_path)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    (tmp_path / name).unlink()


@pytest.mark.parametrize('name', ['report.html', 'report.png', 'report.html.partial'])
def test_a_link_in_place_of_a_report_is_one_line_and_is_not_followed(tmp_path, runs, name):
  (tmp_path / 'canary').write_text('what was there')
  (tmp_path / 'out').mkdir()
  (tmp_path / 'out' / name).symlink_to(tmp_path / 'canary')
  done, _ = command(*runs, '--out', tmp_path / 'out')
  assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and name in done.stderr
  assert (tmp_path / 'canary').read_text() == 'what was there'
  assert [path.name for path in (tmp_path / 'out').iterdir()] == [name]


def test_the_command_prints_the_table_and_the_path(runs, tmp_path):
  done, _ = command(*runs, '--out', tmp_path)
  assert done.returncode == 0, done.stderr
  assert 'bits/byte' in done.stdout and done.stdout.rstrip().endswith(str(tmp_path / 'report.html'))


def test_help_loads_nothing_heavy():
  program = ('import sys, efficient_lm.report\n'
             'print(sorted({"jax", "flax", "numpy", "matplotlib", "rich"} & set(sys.modules)))')
  assert subprocess.run([sys.executable, '-c', program], capture_output=True, text=True).stdout == '[]\n'
  done, seconds = command('--help')
  assert done.returncode == 0 and 'report.html' in done.stdout and seconds < 3   # 0.1 s on an idle machine


@pytest.mark.filterwarnings('ignore:.*:RuntimeWarning')   # of matplotlib, about a plot without a finite point
@pytest.mark.parametrize('values', [[np.inf, -np.inf], [np.nan], [1e300, -1e308], [3e38, 1.0], [10 ** 30, 0.0]])
def test_numbers_of_a_run_that_diverged_make_a_page(tmp_path, values):
  tracker = Tracker(tmp_path)
  for step, value in enumerate(values, 1):
    tracker.scalars(step, {'loss': value, 'load': [[value, value]]})
    tracker.scalars(step, {'eval/bits_per_byte': value})
  tracker.close()
  assert 'training loss' in report_page.write_report(tmp_path).read_text()
