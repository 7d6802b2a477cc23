"""Nothing outside a run's folder is written or deleted; what is written is there as a whole; who has lost the lock writes no
more."""
import ast
import os
import pathlib
import shutil
import socket
import subprocess
import sys

import pytest

from efficient_lm.commands import exit_code
from efficient_lm.config import experiment
from efficient_lm.errors import ConfigError
from efficient_lm.runs import ledger, report_page, results
from efficient_lm.runs.checkpoint import Checkpoints
from efficient_lm.runs.tracking import Tracker
from efficient_lm.system import workdir
from tests import minute

ROOT = pathlib.Path(__file__).parent.parent.parent
FILES = ('config.json', 'config.json.partial', 'run.json', 'run.json.partial', 'tokenizer.json', 'tokenizer.json.partial',
         'ledger.json', 'ledger.json.partial', 'ledger.json.tmp', 'ledger.json.damaged', 'metrics.jsonl',
         'metrics.jsonl.tmp', 'metrics.jsonl.partial', 'metrics.jsonl.damaged', 'report.html', 'report.png',
         'report.html.partial', 'lock', 'samples/00000002.txt', 'samples/stage_2.txt', 'stages/1_train/begun.json',
         'stages/1_train/4/manifest/metadata', 'tensorboard/events', 'tensorboard/hparams/events')
FOLDERS = ('samples', 'stages', 'stages/1_train', 'stages/1_train/4', 'stages/1_train.old', 'stages/2_quantize/checkpoints',
           'checkpoints', 'checkpoints.old', 'checkpoints/3', 'checkpoints/3.corrupt', 'checkpoints/3.orbax-checkpoint-tmp',
           'tensorboard', 'tensorboard/hparams')


@pytest.fixture
def outside(tmp_path):
  """A folder that is none of the run's business, with all that a link may lead to; afterwards it is as it was."""
  folder = tmp_path / 'outside'
  (folder / '3').mkdir(parents=True)
  for name in ('canary', '3/array'): (folder / name).write_text('what was there')
  yield folder
  assert sorted(str(path.relative_to(folder)) for path in folder.rglob('*')) == ['3', '3/array', 'canary']
  assert {path.read_text() for path in folder.rglob('*') if path.is_file()} == {'what was there'}


def linked(folder, name, target):
  (folder / name).parent.mkdir(parents=True, exist_ok=True)
  (folder / name).symlink_to(target)
  return folder


def names(folder):
  return sorted(str(path.relative_to(folder)) for path in folder.rglob('*'))


# ------------------------------------------------------------------ links

@pytest.mark.fault('links in the folder of a run, and a canary outside', 'refused, the canary as it was')
@pytest.mark.parametrize('name', FILES + FOLDERS)
@pytest.mark.parametrize('target', ['canary', '.', 'nowhere'])
def test_a_link_where_a_run_writes_is_refused_before_anything_is_written(tmp_path, outside, name, target):
  folder = linked(tmp_path / 'run', name, outside / target)
  before = names(folder)
  with pytest.raises(ConfigError) as caught: workdir.check(folder)
  assert caught.value.value == str(folder / name) and 'is a link' in str(caught.value) and '\n' not in str(caught.value)
  assert names(folder) == before


@pytest.mark.parametrize('name', ['checkpoints', 'report.html', 'metrics.jsonl.damaged'])
def test_a_run_is_refused_in_a_line_as_soon_as_its_config_is_read(tmp_path, outside, name, capsys):
  folder = linked(tmp_path / 'run', name, outside)
  begin = lambda overrides: experiment.refuse_other(str(folder), minute.get_config('quick'))   # as the command does
  assert exit_code(begin, ['main']) == 2
  line, = capsys.readouterr().err.splitlines()
  assert name in line and names(folder) == [name]


def test_the_folder_itself_and_what_no_run_writes_may_be_links(tmp_path, outside):
  (tmp_path / 'real').mkdir()
  (tmp_path / 'run').symlink_to(tmp_path / 'real')
  linked(tmp_path / 'run', 'notes', outside)
  workdir.check(tmp_path / 'run')
  with workdir.lock(tmp_path / 'run'): workdir.write(tmp_path / 'run', 'samples/a.txt', 'text')
  assert (tmp_path / 'real' / 'samples' / 'a.txt').read_text() == 'text'


@pytest.mark.parametrize('name', FILES)
def test_what_is_no_file_is_refused_too(tmp_path, name):
  """A pipe would be waited for without end."""
  (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
  os.mkfifo(tmp_path / name)
  with pytest.raises(ConfigError, match='neither a file nor a folder'): workdir.check(tmp_path)


WRITES = {
  'write': ('a/file', lambda folder: workdir.write(folder, 'a/file', 'text')),
  'write beside': ('a/file.partial', lambda folder: workdir.write(folder, 'a/file', 'text')),
  'write below': ('a', lambda folder: workdir.write(folder, 'a/file', 'text')),
  'fill': ('a/file', lambda folder: workdir.fill(folder, 'a/file', lambda path: pathlib.Path(path).write_text('text'))),
  'fill beside': ('a/file.partial', lambda folder: workdir.fill(folder, 'a/file', pathlib.Path.touch)),
  'delete': ('file', lambda folder: workdir.delete(folder, 'file')),
  'append': ('file', lambda folder: workdir.append(folder, 'file')),
  'folder': ('a', lambda folder: workdir.folder(folder, 'a/b')),
  'remove': ('a', lambda folder: workdir.remove(folder, 'a')),
  'remove below': ('a', lambda folder: workdir.remove(folder, 'a/3')),
  'move': ('a', lambda folder: workdir.move(folder, 'a', 'b')),
  'move onto': ('b', lambda folder: ((folder / 'a').mkdir(), workdir.move(folder, 'a', 'b'))),
  'lock': ('lock', lambda folder: workdir.lock(folder).__enter__()),
  'report': ('report.png', lambda folder: report_page.write([results.Result('run', {}, [], [], '')], folder)),
  'metrics': ('metrics.jsonl', Tracker),
  'board': ('tensorboard', Tracker),
  'ledger': ('ledger.json', lambda folder: ledger.write(folder, [])),
  'checkpoints': ('checkpoints', lambda folder: Checkpoints(folder / 'checkpoints').save(4, {'step': 4})),
  'a step': ('checkpoints/3', lambda folder: Checkpoints(folder / 'checkpoints').save(4, {'step': 4})),
}


@pytest.mark.fault('links in the folder of a run, and a canary outside', 'refused, the canary as it was')
@pytest.mark.parametrize('way', WRITES)
@pytest.mark.parametrize('target', ['canary', '.'])
def test_no_way_of_writing_or_deleting_follows_a_link(tmp_path, outside, way, target):
  """Also where nothing was checked before."""
  name, act = WRITES[way]
  folder = linked(tmp_path / 'run', name, outside / target)
  with pytest.raises(ConfigError, match='is a link'): act(folder)


@pytest.mark.parametrize('way', [lambda folder: workdir.append(folder, 'lock'),
                                 lambda folder: workdir.lock(folder).__enter__()])
def test_a_file_that_is_another_one_too_is_not_written_in_place(tmp_path, outside, way):
  (tmp_path / 'run').mkdir()
  os.link(outside / 'canary', tmp_path / 'run' / 'lock')
  with pytest.raises(ConfigError, match='is a hard link'): way(tmp_path / 'run')
  (tmp_path / 'run' / 'lock').unlink()


def test_one_that_is_replaced_as_a_whole_leaves_the_other_as_it_was(tmp_path, outside):
  (tmp_path / 'run').mkdir()
  for name in ('ledger.json', 'ledger.json.partial'): os.link(outside / 'canary', tmp_path / 'run' / name)
  workdir.write(tmp_path / 'run', 'ledger.json', '[]')
  assert (tmp_path / 'run' / 'ledger.json').read_text() == '[]'


@pytest.mark.parametrize('name', ['/etc/hosts', '../x', 'a/../../x'])
def test_a_name_never_leads_out_of_the_folder(tmp_path, name):
  for way in (workdir.place, workdir.folder, workdir.remove, workdir.append):
    with pytest.raises(ConfigError, match='must be inside'): way(tmp_path, name)


def test_deleting_leaves_what_links_lead_to(tmp_path, outside):
  linked(tmp_path / 'run', 'a/deep/link', outside)
  workdir.remove(tmp_path / 'run', 'a')
  assert not (tmp_path / 'run' / 'a').exists()


# ------------------------------------------------------------------ as a whole

@pytest.mark.parametrize('call', ['replace', 'fsync', 'open'])
def test_a_kill_at_any_moment_leaves_the_old_file_or_the_new_one(tmp_path, monkeypatch, call):
  workdir.write(tmp_path, 'file', 'old')
  class Killed(Exception): pass
  def killed(*arguments, **words): raise Killed
  with monkeypatch.context() as patch, pytest.raises(Killed):
    patch.setattr(os, call, killed)
    workdir.write(tmp_path, 'file', 'new')
  assert (tmp_path / 'file').read_text() == 'old'
  workdir.write(tmp_path, 'file', b'new')
  assert (tmp_path / 'file').read_text() == 'new' and names(tmp_path) == ['file'], 'nothing is left beside it'


# ------------------------------------------------------------------ the lock

@pytest.mark.parametrize('lost', ['removed', 'replaced', 'the folder moved', 'the folder removed'])
def test_who_has_lost_the_lock_writes_no_more(tmp_path, lost):
  folder, aside = tmp_path / 'run', tmp_path / 'aside'
  with workdir.lock(folder):
    tracker, checkpoints = Tracker(folder), Checkpoints(folder / 'checkpoints')
    tracker.scalars(1, {'loss': 1.0})
    if lost.startswith('the folder'): shutil.move(folder, aside) if 'moved' in lost else shutil.rmtree(folder)
    else: (folder / 'lock').unlink()
    if lost == 'replaced': (folder / 'lock').write_text('of another')
    before = names(tmp_path)
    for act in (lambda: tracker.scalars(2, {'loss': 1.0}), lambda: checkpoints.save(1, {'step': 1}),
                lambda: workdir.write(folder, 'config.json', ''), lambda: workdir.append(folder, 'metrics.jsonl'),
                lambda: workdir.remove(folder, 'checkpoints'), lambda: workdir.folder(folder, 'samples')):
      with pytest.raises(ConfigError, match='has lost its lock') as caught: act()
      assert '\n' not in str(caught.value)
    assert names(tmp_path) == before
    workdir.write(tmp_path / 'other', 'file', 'text')   # a folder that is not locked


def test_of_two_writers_the_second_is_refused_and_once_the_lock_is_deleted_the_first_stops(tmp_path):
  program = ('import sys\nfrom efficient_lm.system import workdir\n'
             'with workdir.lock(sys.argv[1]): print(workdir.write(sys.argv[1], "file", "of the second"))')
  second = lambda: subprocess.run([sys.executable, '-c', program, tmp_path], capture_output=True, text=True, check=False)
  with workdir.lock(tmp_path):
    assert f'another process uses it (host {socket.gethostname()}, process {os.getpid()})' in second().stderr
    (tmp_path / 'lock').unlink()
    assert second().returncode == 0
    with pytest.raises(ConfigError, match='has lost its lock'): workdir.write(tmp_path, 'file', 'of the first')
  assert (tmp_path / 'file').read_text() == 'of the second'


def test_the_lock_is_free_afterwards_even_if_it_was_lost(tmp_path):
  with workdir.lock(tmp_path): (tmp_path / 'lock').unlink()
  with workdir.lock(tmp_path): workdir.write(tmp_path, 'file', 'text')
  workdir.write(tmp_path, 'file', 'without any')


def test_a_lock_that_is_a_folder_is_one_line(tmp_path):
  (tmp_path / 'lock').mkdir()
  with pytest.raises(ConfigError, match='is a folder'):
    with workdir.lock(tmp_path): pass


# ------------------------------------------------------------------ nowhere else

WRITING = {'write_text', 'write_bytes', 'rmtree', 'rename', 'unlink', 'mkdir', 'makedirs', 'symlink_to', 'touch', 'savefig',
           'copytree', 'move'}
# Of /proc; a picture into memory; a file of a random name, by which processes find out that they see one folder; and ours.
ALLOWED = ("Path('/proc/self/clear_refs').write_text('5')", 'picture.savefig(buffer', '(folder / name).', 'workdirs.')


def writes(tree):
  """Calls in a module that write, delete or rename files."""
  for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
    text, name = ast.unparse(call), getattr(call.func, 'attr', getattr(call.func, 'id', ''))
    modes = [one.value for one in [*call.args, *(word.value for word in call.keywords)] if isinstance(one, ast.Constant)]
    opens = name == 'open' and any(isinstance(mode, str) and set(mode) & set('wax+') and len(mode) < 4 for mode in modes)
    of_os = text.startswith(('os.replace', 'os.open', 'os.remove', 'os.link', 'os.symlink', 'os.rmdir'))
    if (name in WRITING or opens or of_os) and not text.startswith(ALLOWED): yield text


@pytest.mark.parametrize('name', sorted(str(file.relative_to(ROOT)) for room in ('runs', 'config')
                                        for file in (ROOT / 'efficient_lm' / room).glob('*.py')))
def test_no_other_module_of_runs_writes_files_by_itself(name):
  assert not list(writes(ast.parse((ROOT / name).read_text())))


def test_what_writes_is_seen():
  text = ("open(p, 'w')\nopen(p, mode='ab')\np.open('r+')\np.write_text('x')\nshutil.rmtree(p)\np.rename(q)\n"
          "os.replace(p, q)\npicture.savefig(path)\n")
  assert len(list(writes(ast.parse(text)))) == 8
  assert not list(writes(ast.parse("open(p)\nopen(p, 'rb')\nworkdirs.move(a, b, c)\ntext.replace('a', 'w')\n")))
