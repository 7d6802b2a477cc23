"""Up to four processes that train as one: taken up by other numbers of them over other meshes, killed, and started wrongly.
Minutes: only with `--long`."""
import shutil
import signal
import time

import pytest

from efficient_lm.errors import OtherProcess
from efficient_lm.runs import ledger
from tests import starting

WORDS = ['--config=tests/minute.py:moe', '--config.train.steps=60', '--config.train.checkpoint_every=10',
         '--config.train.eval_every=60']
MESHES = {1: [], 2: ['--config.mesh.data=1', '--config.mesh.tensor=2'],
          4: ['--config.mesh.data=1', '--config.mesh.expert=2', '--config.mesh.fsdp=2']}
pytestmark = pytest.mark.fault('one of several processes killed, sent SIGTERM, or started otherwise',
                               'all ended as one, nothing lost')
ENDING = 60   # seconds that processes may take to notice that one has gone

CONFIG = '''
import dataclasses
from efficient_lm.config import Train
from efficient_lm.formats import Group, Int
from efficient_lm.techniques import Convert, Prune, PruneOnce, QuantAware, Quantize, Rule
from tests import minute

def get_config(variant='all'):
  made = minute.get_config('quick')
  rules = (Rule(where='mlp|attention', weights=Int(bits=4, scales=Group(size=8))),)
  stages = (PruneOnce(sparsity=0.5), Train(training=made.train, techniques=(QuantAware(rules=rules),)), Convert())
  if variant == 'quantize': stages = (Quantize(rules=rules),)
  return dataclasses.replace(made, techniques=(Prune(sparsity=0.25, start=1, end=3, every=1),), stages=stages)
'''


@pytest.fixture(scope='module', autouse=True)
def asked_for(request):
  """Each of these starts a dozen programs."""
  if not request.config.getoption('--long'): pytest.skip('needs --long')


@pytest.fixture(scope='module')
def alone(tmp_path_factory):
  """What one process logs that nobody touches."""
  workdir = tmp_path_factory.mktemp('alone')
  starting.finish(starting.start(workdir, WORDS))
  return starting.logged(workdir)


def close(found: dict, expected: dict):
  assert found.keys() == expected.keys()
  for (step, name), value in expected.items():
    if name in ('loss', 'cross_entropy', 'bits_per_byte', 'eval/bits_per_byte'):
      assert found[step, name] == pytest.approx(value, abs=1e-5), (step, name)


def interrupt(workdir, processes: int, step: int, victim: int):
  """Lets so many processes go on to `step`, then sends SIGTERM to one; all stop at one step, with the state of it saved."""
  programs = starting.start(workdir, [*WORDS, *MESHES[processes]], processes)
  starting.wait_for_step(programs, workdir, step)
  programs[victim].send_signal(signal.SIGTERM)
  codes, _, said = starting.ends(programs)
  assert codes == [42] * processes, said
  last = max(row['step'] for row in starting.rows(workdir))
  assert starting.saved(workdir)[-1] == last
  assert all(f'at step {last}:' in line for line in said), said


@pytest.mark.parametrize('chain', [(1, 4, 2), (2, 1, 4)], ids=str)
def test_any_number_takes_up_what_any_other_began(alone, tmp_path, chain):
  for i, processes in enumerate(chain[:-1]): interrupt(tmp_path, processes, 6 + 20 * i, victim=processes - 1)
  starting.finish(starting.start(tmp_path, [*WORDS, *MESHES[chain[-1]]], chain[-1]))
  close(starting.logged(tmp_path), alone)


def test_several_devices_each_and_all_axes_of_the_mesh(alone, tmp_path):
  words = ['--config.mesh.data=1', '--config.mesh.expert=2', '--config.mesh.tensor=2', '--config.mesh.fsdp=2']
  starting.finish(starting.start(tmp_path, [*WORDS, *words], processes=4, devices=2))
  close(starting.logged(tmp_path), alone)


@pytest.mark.parametrize('victim', [0, 3])
def test_one_killed_ends_all_soon_and_the_same_command_resumes(alone, tmp_path, victim):
  words = [*WORDS, *MESHES[4]]
  programs = starting.start(tmp_path, words, processes=4)
  starting.wait_for_step(programs, tmp_path, 25)
  programs[victim].kill()
  killed = time.monotonic()
  codes, _, said = starting.ends(programs)
  assert time.monotonic() - killed < ENDING
  # Where process 0 has gone, JAX may abort the others before they can say so.
  others = set(codes[:victim] + codes[victim + 1:])
  assert codes[victim] == -signal.SIGKILL and others <= {OtherProcess.exit_code, -signal.SIGABRT}, said
  starting.finish(starting.start(tmp_path, words, processes=4))
  close(starting.logged(tmp_path), alone)


def test_stages_over_two_processes_leave_what_one_leaves(tmp_path):
  (tmp_path / 'stages.py').write_text(CONFIG)
  words = [f'--config={tmp_path}/stages.py']
  starting.finish(starting.start(tmp_path / 'one', words))
  starting.finish(starting.start(tmp_path / 'two', [*words, '--config.mesh.data=1', '--config.mesh.fsdp=2'], processes=2))
  one, two = (ledger.read(tmp_path / name / 'ledger.json') for name in ('one', 'two'))
  assert [row.stage for row in one] == [row.stage for row in two] and len(one) == 4
  for left, right in zip(one, two):
    assert left.quality.bits_per_byte == pytest.approx(right.quality.bits_per_byte, abs=1e-3)
    assert (left.size.nonzero_parameters, left.notes) == (right.size.nonzero_parameters, right.notes)


def test_a_signal_at_any_moment_ends_both_with_42_and_the_same_command_goes_on(tmp_path):
  """In trainings, evaluations, other stages, compilations and commits, once they have met; to one, then to the other."""
  (tmp_path / 'stages.py').write_text(CONFIG)
  words = [f'--config={tmp_path}/stages.py', '--config.train.eval_every=2']
  starting.finish(starting.start(tmp_path / 'one', words, processes=2))
  codes, attempt, workdir = [42, 42], 0, tmp_path / 'two'
  while codes == [42, 42]:
    programs = starting.start(workdir, words, processes=2)
    assert any('devices' in line for line in programs[0].stdout), starting.ends(programs)   # they have met
    time.sleep(1 + 1.5 * attempt)
    programs[attempt % 2].send_signal(signal.SIGTERM)
    codes, _, said = starting.ends(programs)
    assert codes in ([42, 42], [0, 0]), (attempt, codes, said)
    if codes[0]: assert all(len(text.splitlines()) == 1 and 'SIGTERM' in said[attempt % 2] for text in said), said
    attempt += 1
  assert attempt > 3
  one, two = (ledger.read(tmp_path / name / 'ledger.json') for name in ('one', 'two'))
  assert [row.quality for row in one] == [row.quality for row in two]
  assert starting.logged(tmp_path / 'one') == starting.logged(workdir)


def test_a_stage_for_one_process_is_refused_before_anything_is_written_and_done_by_one(tmp_path):
  (tmp_path / 'stages.py').write_text(CONFIG)
  words, workdir = [f'--config={tmp_path}/stages.py:quantize'], tmp_path / 'run'
  codes, _, said = starting.ends(starting.start(workdir, words, processes=2))
  assert codes == [2, 2] and not workdir.exists()
  for line in said: assert len(line.splitlines()) == 1 and 'config.stages[0]' in line and 'on one host alone' in line, said
  starting.finish(starting.start(workdir, [*words, '--config.stages=()'], processes=2))
  starting.finish(starting.start(workdir, words))
  assert [row.stage for row in ledger.read(workdir / 'ledger.json')] == ['1 train', '2 quantize']


@pytest.mark.parametrize(('own', 'named'), [
  ({1: ['--config.train.log_every=7']}, 'config = '), ({1: ['--workdir={}/other']}, '--workdir = '),
  ({1: ['--num_processes=3']}, '--num_processes = ')], ids=['config', 'workdir', 'number'])
def test_processes_that_are_not_told_the_same_all_refuse(tmp_path, own, named):
  own = {number: [word.format(tmp_path) for word in words] for number, words in own.items()}
  (tmp_path / 'run').mkdir()
  (tmp_path / 'other').mkdir()
  codes, _, said = starting.ends(starting.start(tmp_path / 'run', WORDS, processes=2, own=own))
  assert codes == [2, 2], said
  assert all(len(line.splitlines()) == 1 and named in line for line in said), said
  assert not [*(tmp_path / 'run').iterdir(), *(tmp_path / 'other').iterdir()]


def test_a_workdir_in_use_is_refused_by_all(tmp_path):
  first = starting.start(tmp_path, WORDS)
  starting.wait_for_step(first, tmp_path, 1)
  codes, _, said = starting.ends(starting.start(tmp_path, WORDS, processes=2))
  assert codes == [2, 2] and all('another process uses it' in line for line in said), said
  starting.finish(first)


def test_a_damaged_checkpoint_is_passed_over_by_all(alone, tmp_path):
  interrupt(tmp_path, 2, 12, victim=0)
  newest = tmp_path / 'checkpoints' / str(starting.saved(tmp_path)[-1])
  for file in newest.rglob('d/*'):
    if file.is_file(): file.write_bytes(bytes(byte ^ 1 for byte in file.read_bytes()))
  shutil.rmtree(newest / 'rest', ignore_errors=True)
  starting.finish(starting.start(tmp_path, [*WORDS, *MESHES[4]], processes=4))
  close(starting.logged(tmp_path), alone)
