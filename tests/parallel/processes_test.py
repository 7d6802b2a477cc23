"""Which processes a run has, and what they say to each other. (`runs/several_test` starts real ones.)"""
import itertools
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from efficient_lm.errors import CheckpointError, ConfigError, IncompatibleError, NonFinite, OtherProcess, Preempted
from efficient_lm.parallel import processes
from efficient_lm.parallel.processes import Group, group_of
from efficient_lm.system import interruption
from tests.starting import free_port

SLURM = {'SLURM_JOB_ID': '77', 'SLURM_STEP_NODELIST': 'node[1-2]', 'SLURM_NTASKS': '2', 'SLURM_PROCID': '1',
         'SLURM_LOCALID': '0'}


def test_flags_and_variables_mean_the_same():
  expected = Group('10.0.0.2:8476', 1, 2)
  assert group_of('10.0.0.2:8476', 1, 2, {}) == expected
  variables = {'JAX_COORDINATOR_ADDRESS': '10.0.0.2:8476', 'JAX_PROCESS_ID': '1', 'JAX_NUM_PROCESSES': '2'}
  assert group_of(None, None, None, variables) == expected
  assert group_of('[::1]:1', 0, 3, variables) == Group('[::1]:1', 0, 3)


def test_one_process_is_no_group():
  assert group_of(None, None, None, {}) is None
  assert group_of('10.0.0.2:8476', 0, 1, {}) is None
  assert group_of(None, None, None, SLURM | {'SLURM_NTASKS': '1'}) is None


def test_slurm_is_left_to_jax_unless_flags_say_otherwise():
  assert group_of(None, None, None, SLURM) == Group()
  assert group_of(None, None, None, SLURM | {'JAX_COORDINATOR_ADDRESS': 'node7:99'}) == Group('node7:99')
  assert group_of('node1:9', 0, 4, SLURM) == Group('node1:9', 0, 4)
  for name in SLURM:   # outside of srun some are missing
    assert group_of(None, None, None, {key: value for key, value in SLURM.items() if key != name}) is None


@pytest.mark.parametrize('given', [given for given in itertools.product((None, 'a:1'), (None, 0), (None, 2))
                                   if 0 < sum(value is not None for value in given) < 3])
def test_a_part_of_the_words_is_refused_with_what_is_missing(given):
  missing = [name for name, value in zip(('coordinator', 'process_id', 'num_processes'), given) if value is None]
  for environ in ({}, SLURM):
    with pytest.raises(ConfigError, match='given together') as raised: group_of(*given, environ)
    assert raised.value.field.lstrip('-') in missing


@pytest.mark.parametrize(('words', 'field'), [
  (('a:1', 2, 2), '--process_id'), (('a:1', -1, 2), '--process_id'), (('a:1', 0, 0), '--num_processes'),
  *(((address, 0, 2), '--coordinator') for address in (
    'localhost', 'a:', ':1', 'a:0', 'a:65536', 'a:b', 'http://a:1', 'a b:1', 'a:-1'))])
def test_words_that_cannot_be_meant_are_refused(words, field):
  with pytest.raises(ConfigError) as raised: group_of(*words, {})
  assert raised.value.field == field


@pytest.mark.parametrize('name', ['JAX_PROCESS_ID', 'JAX_NUM_PROCESSES', 'SLURM_NTASKS'])
def test_a_variable_that_is_no_number_is_refused_by_its_name(name):
  with pytest.raises(ConfigError) as raised: group_of(None, None, None, SLURM | {name: 'two'})
  assert raised.value.field == name


@given(st.one_of(st.none(), st.text(max_size=12)), st.one_of(st.none(), st.integers()), st.one_of(st.none(), st.integers()))
def test_whatever_is_given_is_a_group_or_one_line(coordinator, process_id, num_processes):
  try: found = group_of(coordinator, process_id, num_processes, {})
  except ConfigError as error: assert len(str(error).splitlines()) == 1
  else: assert found is None or 0 <= found.process_id < found.num_processes


@pytest.mark.parametrize('process', [0, 1])
def test_who_does_not_come_is_one_line_after_the_stated_time(process):
  code = ('import sys\nfrom efficient_lm.parallel import processes\n'
          'processes.join(processes.Group(sys.argv[1], int(sys.argv[2]), 2), 1)')
  done = subprocess.run([sys.executable, '-c', code, f'127.0.0.1:{free_port()}', str(process)], capture_output=True,
                        text=True, timeout=60, check=False)
  assert done.returncode == OtherProcess.exit_code
  assert len(done.stderr.splitlines()) == 1 and 'within 1 seconds' in done.stderr and '--coordinator' in done.stderr


@pytest.fixture
def initialized(monkeypatch):
  """What JAX is called with to meet the others."""
  import jax
  found = {}
  def initialize(coordinator, count, number, **words): found.update(words, words=(coordinator, count, number))
  monkeypatch.setattr(jax.distributed, 'initialize', initialize)
  for name in (*SLURM, 'SLURM_NNODES', 'SLURM_STEP_NUM_NODES', 'SLURM_GPUS_ON_NODE'): monkeypatch.delenv(name, False)
  yield found
  jax.config.update('jax_enable_preemption_service', True)


def test_alone_nothing_is_initialized(initialized):
  processes.join(None)
  assert not initialized


def test_process_0_listens_on_the_given_address_only(initialized):
  processes.join(Group('10.0.0.2:8476', 0, 2), 9)
  assert initialized['words'] == ('10.0.0.2:8476', 2, 0)
  assert initialized['coordinator_bind_address'] == '10.0.0.2:8476' and initialized['initialization_timeout'] > 9
  assert initialized['cluster_detection_method'] == 'deactivate'


@pytest.mark.parametrize(('tasks', 'gpus', 'expected'), [('2', '4', [0, 1, 2, 3]), ('8', '4', None), ('2', '', None)])
def test_a_process_that_has_a_node_to_itself_takes_all_its_gpus(initialized, monkeypatch, tasks, gpus, expected):
  variables = SLURM | {'SLURM_STEP_NUM_NODES': '2', 'SLURM_NTASKS': tasks, 'SLURM_GPUS_ON_NODE': gpus}
  for name, value in variables.items(): monkeypatch.setenv(name, value)
  processes.join(group_of(None, None, None))
  assert initialized['words'] == (None, None, None)
  assert (list(initialized['local_device_ids']) if 'local_device_ids' in initialized else None) == expected


# ---------------------------------------------------------------- agreeing: `_gathered` as other processes would have it

@pytest.fixture
def others(monkeypatch):
  """others(number, *arrays): this is process `number`, and those are what the others put in at the next exchanges."""
  def say(*arrays, number=0):
    monkeypatch.setattr(processes, 'several', lambda: True)
    monkeypatch.setattr(processes, 'is_first', lambda: number == 0)
    answers = iter(arrays)
    def gathered(own):
      other = next(answers)
      other = other if other is not None else own
      return np.stack([own, other] if number == 0 else [other, own])
    monkeypatch.setattr(processes, 'gathered', gathered)
    return answers
  return say


def outcome(error=None):
  """What a process says at the end of `together`."""
  said = []
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(processes, 'several', lambda: True)
    patch.setattr(processes, 'gathered', lambda own: said.append(own) or own[None] * 0)
    try:
      with processes.together():
        if error: raise error
    except type(error): pass
  return said[0]


@pytest.mark.parametrize('error', [
  ConfigError('a', 1, 'must be 2'), IncompatibleError('does not suit'), CheckpointError('disk full: äöü ' * 99),
  NonFinite('x'), Preempted('y'), OtherProcess('z'), KeyError('a bug')])
def test_what_one_raises_ends_the_other_with_its_code_and_words(others, error):
  others(outcome(error))
  with pytest.raises((Exception, Preempted), match='process 1') as raised:
    with processes.together(): pass
  assert raised.value.exit_code == getattr(error, 'exit_code', OtherProcess.exit_code)
  assert str(error).strip("'")[:100] in str(raised.value)


def test_what_raises_here_is_raised_as_it_is_and_nobody_waits(others):
  left = others(outcome())
  with pytest.raises(ZeroDivisionError):
    with processes.together(): _ = 1 / 0
  assert not list(left), 'the others have not heard of it'


@pytest.mark.parametrize('number', [0, 1])
def test_the_first_process_alone_acts_and_all_wait_before_and_after(others, number):
  left, done = others(outcome(), outcome(), number=number), []
  processes.on_first(done.append, 1)
  assert done == [1] * (number == 0) and not list(left)


def test_a_process_with_another_command_is_named(others):
  same = {'config': 'a', 'text': 'b'}
  others(None)
  processes.refuse_unlike(**same)
  said = []
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(processes, 'several', lambda: True)
    patch.setattr(processes, 'gathered', lambda own: said.append(own) or own[None])
    processes.refuse_unlike(config='a', text='c')
  others(said[0])
  with pytest.raises(ConfigError, match=r'text = .process 1.'): processes.refuse_unlike(**same)


def test_one_process_agrees_with_itself_at_once():
  agreed = processes.Agreement()
  assert [agreed(flag) for flag in (False, True)] == [False, True]


@given(st.lists(st.lists(st.booleans(), min_size=12, max_size=12), min_size=1, max_size=4))
def test_all_processes_hear_of_a_flag_at_the_same_step(flags_PS):
  raised_PS = np.maximum.accumulate(flags_PS, 1)   # a flag stays raised
  any_S = raised_PS.any(0)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(processes, 'several', lambda: True)
    heard_PS = []
    for flags_S in raised_PS:
      steps = iter(any_S)
      patch.setattr(processes, '_any', lambda flag, steps=steps: next(steps))
      agreed = processes.Agreement()
      heard_PS.append([agreed(bool(flag)) for flag in flags_S])
  assert all(heard_S == heard_PS[0] for heard_S in heard_PS)
  assert heard_PS[0] == [False] * processes.BEHIND + any_S[:-processes.BEHIND].tolist()


@pytest.mark.parametrize('flag', [False, True])
def test_any_of_eight_devices(flag):
  assert bool(processes._any(flag)) is flag


def test_what_all_devices_hold_a_part_of_is_fetched_whole(mesh):
  import jax
  from jax.sharding import NamedSharding, PartitionSpec
  with mesh(2, 2, 1, 2):
    sharding = NamedSharding(jax.sharding.get_mesh(), PartitionSpec('fsdp', 'tensor'))
    tree = {'a': jax.device_put(np.arange(16.0).reshape(4, 4), sharding), 'b': 3}
  found = processes.fetched(tree)
  np.testing.assert_array_equal(found['a'], np.arange(16.0).reshape(4, 4))
  assert isinstance(found['a'], np.ndarray) and found['b'] == 3


def test_an_error_of_one_ends_it_at_once_and_one_that_all_have_goes_on(monkeypatch, capsys):
  ended = []
  monkeypatch.setattr(processes, 'several', lambda: True)
  monkeypatch.setattr(interruption, 'leave', ended.append)
  with processes.ending_together(): raise ValueError('UNKNOWN: Gloo all-reduce failed: Connection reset by peer')
  assert ended == [6] and len(capsys.readouterr().err.splitlines()) == 1
  with processes.ending_together(): raise ValueError('a bug')
  assert ended == [6, 1] and 'Traceback' in capsys.readouterr().err
  with processes.ending_together(): raise Preempted('SIGTERM while a stage was computed')
  assert ended == [6, 1, 42] and capsys.readouterr().err == 'SIGTERM while a stage was computed\n'
  in_all = Preempted('at step 3')
  in_all.in_all = True
  for error in (ConfigError('a', 1, 'b'), in_all):
    with pytest.raises(type(error)):
      with processes.ending_together(): raise error
  assert ended == [6, 1, 42]
