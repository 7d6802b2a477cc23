"""Two thousand steps, with logs, evaluations, samples and saves, take no more memory and no more open files at their end
than at step 500. A minute: only with `--long`.

Linux may take back a fifth of the memory meanwhile, zeros in huge pages, which would hide what grows; so rises are summed,
too. They are not 0: of each save TensorStore keeps some 700 strings for ever, 0.1 MB with the table of them (under Orbax
0.12.8, seen with tracemalloc), and 30 saves lie between step 500 and the end."""
import itertools
import os
import pathlib
import statistics
import time

import pytest

from tests import starting

STEPS, FIRST, MOST = 2000, 500, 1.02
RISES = 0.04   # of the memory at step 500: 1.6 % were seen, and twice that where nothing is evaluated in between
WORDS = ['--config=tests/minute.py:quick', f'--config.train.steps={STEPS}', '--config.train.log_every=10',
         '--config.train.eval_every=100', '--config.train.checkpoint_every=50']
WINDOW = 250   # steps whose samples are taken together: a save or an evaluation under way takes some for a moment
PAGE = os.sysconf('SC_PAGE_SIZE')


def look(number: int) -> tuple[int, int]:
  """Bytes in memory and open files of a process."""
  pages = int(pathlib.Path(f'/proc/{number}/statm').read_text().split()[1])
  return pages * PAGE, len(os.listdir(f'/proc/{number}/fd'))


def watch(program, workdir) -> list[tuple[int, int, int]]:
  """(step, bytes in memory, open files), ten times a second, as long as it goes."""
  found = []
  while program.poll() is None:
    file = pathlib.Path(workdir) / 'metrics.jsonl'
    lines = file.read_bytes().split(b'\n')[-3:-1] if file.is_file() else []
    try: seen = look(program.pid)
    except (OSError, IndexError, ValueError): break   # it has just come to its end
    if lines: found.append((int(lines[-1].split(b'"step": ')[1].split(b',')[0]), *seen))
    time.sleep(0.1)
  return found


def between(found, first: int, last: int) -> tuple[float, int]:
  """Of what was seen between two steps the median memory, and the fewest open files: a save opens some for a while."""
  memory, files = zip(*[row[1:] for row in found if first <= row[0] < last])
  return statistics.median(memory), min(files)


def test_memory_and_open_files_stay_as_they_are(tmp_path, request, tried):
  if not request.config.getoption('--long'): pytest.skip('needs --long')
  program, = starting.start(tmp_path, WORDS)
  found = watch(program, tmp_path)
  starting.finish([program])
  assert starting.rows(tmp_path)[-1]['step'] == STEPS
  # The last steps are left out: what follows the training, its end and its ledger, is another program.
  spans = [(first, first + WINDOW) for first in range(FIRST, STEPS - WINDOW + 1, WINDOW)]
  spans[-1] = spans[-1][0], STEPS - 20
  memory, files = zip(*[between(found, *span) for span in spans])
  rises = sum(max(after - before, 0) for before, after in itertools.pairwise(memory)) / memory[0]
  print(f'{len(found)} samples; MiB {[round(size / 2 ** 20, 1) for size in memory]}, rises {rises:.1%}; open files {files}')
  assert memory[-1] <= MOST * memory[0] and rises <= RISES, memory
  assert set(files) == {files[0]}, files
  ends = f'steps: memory ends {memory[-1] / memory[0] - 1:+.1%} of that at {FIRST}, all its rises are {rises:.1%}'
  tried('two thousand steps: memory and open files', STEPS, **{f'{ends}, open files the same': STEPS})
