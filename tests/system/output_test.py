"""A program goes on when nobody reads what it prints, or there is no room for it."""
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent.parent
PROGRAM = '''
import os, sys
from efficient_lm.system import output
output.outlive()
import rich.console, rich.progress
shown = rich.progress.Progress(console=rich.console.Console(force_terminal=True), refresh_per_second=50)
with shown:
  task = shown.add_task('step', total=200)
  for i in range(200):
    shown.update(task, advance=1)
    shown.console.print('x' * 1000)
    print('y' * 1000, flush=True)
    print('warning', file=sys.stderr)
try: os.write(1, b'from below Python')
except OSError: pass   # a full disk; a reader that is gone leaves none
open(sys.argv[1], 'w').write('done')
'''


def run(tmp_path, shell: str, program: str = PROGRAM) -> subprocess.CompletedProcess:
  """`shell` with the program as $P."""
  (tmp_path / 'program.py').write_text(program)
  environment = {**os.environ, 'PYTHONPATH': str(ROOT), 'P': f'{sys.executable} {tmp_path}/program.py {tmp_path}/done'}
  return subprocess.run(['bash', '-c', shell], env=environment, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize('shell', [
  'set -o pipefail; $P | head -1', 'set -o pipefail; $P 2>&1 | head -1', '$P >&-', '$P >&- 2>&-', '$P <&- >&- 2>&-',
  '$P > /dev/full', '$P > /dev/full 2>&1', 'ulimit -f 8; $P > {folder}/log',
], ids=lambda shell: shell.replace('$P', 'program'))
def test_a_program_outlives_its_output(tmp_path, shell):
  done = run(tmp_path, shell.format(folder=tmp_path))
  assert done.returncode == 0 and (tmp_path / 'done').read_text() == 'done', done.stderr
  assert 'Traceback' not in done.stderr and 'Error' not in done.stderr


def test_what_can_be_written_is(tmp_path):
  done = run(tmp_path, '$P', 'from efficient_lm.system import output\noutput.outlive()\nimport sys\n'
                             'print("a"); print("b", file=sys.stderr); print("ä€")')
  assert (done.stdout, done.stderr) == ('a\nä€\n', 'b\n')


def test_a_file_takes_lines_again_once_there_is_room(tmp_path):
  program = '''
import resource, sys
from efficient_lm.system import output
output.outlive()
for limit in (2, 0, 20):
  resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
  print('a', flush=True)
open(sys.argv[1], 'w').write('done')
'''
  run(tmp_path, f'$P > {tmp_path}/log', program)
  assert (tmp_path / 'log').read_text() == 'a\na\n' and (tmp_path / 'done').is_file()


def test_characters_that_the_terminal_lacks_are_no_error(tmp_path):
  done = run(tmp_path, 'PYTHONIOENCODING=ascii $P', 'from efficient_lm.system import output\noutput.outlive()\nprint("–")')
  assert done.stdout == '\\u2013\n' and done.returncode == 0


def test_a_file_that_is_opened_later_is_not_taken_for_standard_output(tmp_path):
  program = ('import os, sys\nfrom efficient_lm.system import output\noutput.outlive()\nfile = open(sys.argv[1], "w")\n'
             'print("text", flush=True)\nos.write(1, b"text")')
  run(tmp_path, '$P >&-', program)
  assert (tmp_path / 'done').read_text() == ''
