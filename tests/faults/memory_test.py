"""Two thousand steps, with logs, evaluations, samples and saves, hold no more memory and no more open files at their end
than at step 500. Two minutes: only with `--long`.

What counts is what malloc has given out and not got back, all of Python's objects too. The memory of the process says
less: Linux takes back zeros in huge pages meanwhile, up to a fifth of it, which would hide what grows. A state has 6 MB, and
15 saves lie between step 500 and the end: if each kept a copy it would be a quarter more. TensorStore does keep some 700
strings of each save, 0.1 MB with the table of them (under Orbax 0.12.8, seen with tracemalloc); and once in a run, at one
save or another, native code takes 3.5 MB more and keeps them: of four runs three ended 0.3 % above step 500, and one, in
which that came later, 1.4 %."""
import os
import pathlib
import statistics
import time

import pytest

from tests import starting

STEPS, FIRST = 2000, 500
FLAT = 0.02   # of the memory at step 500
FOLDER = pathlib.Path(__file__).parent / 'held'
WORDS = ['--config=configs/baseline.py', f'--config.train.steps={STEPS}', '--config.train.batch_size=2',
         '--config.train.sequence_length=64', '--config.train.log_every=10', '--config.train.eval_every=100',
         '--config.data.eval_tokens=1024', '--config.train.checkpoint_every=100']
WINDOW = 250   # steps whose samples are taken together: a save or an evaluation under way takes some for a moment
PAGE = os.sysconf('SC_PAGE_SIZE')


def look(number: int, held) -> tuple[int, int, int]:
  """Of a process: bytes that malloc has given out, bytes in memory, open files."""
  pages = int(pathlib.Path(f'/proc/{number}/statm').read_text().split()[1])
  return int(held.read_text()), pages * PAGE, len(os.listdir(f'/proc/{number}/fd'))


def watch(program, workdir, held) -> list[tuple[int, int, int, int]]:
  """(step, as `look`), ten times a second, as long as it goes."""
  found = []
  while program.poll() is None:
    file = pathlib.Path(workdir) / 'metrics.jsonl'
    lines = file.read_bytes().split(b'\n')[-3:-1] if file.is_file() else []
    try: seen = look(program.pid, held) if lines else ()
    except (OSError, IndexError, ValueError): break   # it has just come to its end
    if lines: found.append((int(lines[-1].split(b'"step": ')[1].split(b',')[0]), *seen))
    time.sleep(0.1)
  return found


def between(found, first: int, last: int) -> tuple[float, float, int]:
  """Of what was seen between two steps the medians of memory, and the fewest open files: a save opens some for a while."""
  held, memory, files = zip(*[row[1:] for row in found if first <= row[0] < last])
  return statistics.median(held), statistics.median(memory), min(files)


def test_memory_and_open_files_stay_as_they_are(tmp_path, request, tried):
  if not request.config.getoption('--long'): pytest.skip('needs --long')
  run, file = tmp_path / 'run', tmp_path / 'held'
  variables = {'PYTHONPATH': f'{FOLDER}:{starting.ROOT}', 'HELD': str(file), 'PYTHONMALLOC': 'malloc',
               'JAX_DISABLE_MOST_OPTIMIZATIONS': '0'}
  program, = starting.start(run, WORDS, variables={0: variables})
  found = watch(program, run, file)
  starting.finish([program])
  assert starting.rows(run)[-1]['step'] == STEPS
  # The last steps are left out: what follows the training, its end and its ledger, is another program.
  spans = [(first, first + WINDOW) for first in range(FIRST, STEPS - WINDOW + 1, WINDOW)]
  spans[-1] = spans[-1][0], STEPS - 20
  held, memory, files = zip(*[between(found, *span) for span in spans])
  mebibytes = lambda sizes: [round(size / 2 ** 20, 1) for size in sizes]
  print(f'{len(found)} samples; MiB held {mebibytes(held)}, in memory {mebibytes(memory)}; open files {files}')
  assert all(abs(size / held[0] - 1) <= FLAT for size in held), held
  assert memory[-1] <= (1 + FLAT) * memory[0], memory
  assert set(files) == {files[0]}, files
  change = lambda sizes: f'{sizes[-1] / sizes[0] - 1:+.1%}'
  ends = f'steps: what is held ends {change(held)} of that at {FIRST}, what is in memory {change(memory)}'
  tried('two thousand steps: memory and open files', STEPS, **{f'{ends}, open files the same': STEPS})
