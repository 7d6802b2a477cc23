"""Writes README.md beside this file from what a run of `make faults` has recorded:

  python -m tests.faults.table FOLDER

Every number in that table comes from there; a fault that was not tried, or failed, is said and is the exit code 1."""
import datetime
import importlib.metadata
import os
import pathlib
import platform
import subprocess
import sys

from tests import tried

README = pathlib.Path(__file__).parent / 'README.md'
PACKAGES = ('jax', 'flax', 'orbax-checkpoint', 'optax')
HEAD = """# What was done to the program, and what came of it

`make faults` tries all of this, and writes this page from what its tests have recorded. A fast part runs in `make test`.

| fault | tries | outcomes | tests |
| --- | --- | --- | --- |
"""
# What there is to be tried. Names are those that tests record.
FAULTS = (
  'kill -9 of a recipe of five stages: anywhere, in saves, between stages',
  'SIGTERM in import, compiling, a step, an evaluation, a save, a stage, the report',
  'five interruptions over three epochs, 1, 2 and 4 processes',
  'one of several processes killed, sent SIGTERM, or started otherwise',
  'a file of a finished run truncated, emptied, deleted, garbled',
  'bits of the files of a finished run flipped',
  'a file of a checkpoint truncated, zeroed, deleted; bits flipped',
  'disk full, no inodes, a limit on file size, at five moments each',
  'losses and gradients that are NaN: first step, warm-up, middle, five in a row, for ever',
  'learning rates of 1e9, 1e30, inf',
  'resharding with masks, moments in 8 bits and the state of quantization',
  'any leaf of a config of a wrong type, negative, zero, huge, infinite, NaN, misspelled',
  'random valid configs: all techniques and stages',
  'odd words to every command',
  'a run of others: config, record, manifest, tokenizer, log, ledger',
  'links in the folder of a run, and a canary outside',
  'two thousand steps: memory and open files',
  'sockets of the internet opened by a training',
)


def outcomes(counts: dict[str, int]) -> str:
  """'12 noticed, 3 harmless', the most frequent first."""
  return ', '.join(f'{count:,} {name}' for name, count in sorted(counts.items(), key=lambda one: -one[1]) if count)


def page(records: list[dict]) -> tuple[str, list[str]]:
  """The page, and what is wrong with it in lines."""
  found, wrong, rows = tried.merged(records), [], []
  for fault in (*FAULTS, *sorted(set(found) - set(FAULTS))):
    if fault not in found:
      wrong.append(f'not tried: {fault}')
      continue
    one = found[fault]
    if tried.FAILED in one['outcomes']: wrong.append(f'failed: {fault}')
    tests = ', '.join(sorted({test.partition('::')[0].removeprefix('tests/').removesuffix('.py') for test in one['tests']}))
    rows.append(f'| {fault} | {one["tries"]:,} | {outcomes(one["outcomes"])} | `{tests.replace(", ", "`, `")}` |')
  missing = ''.join(f'\n{line}\n' for line in wrong)
  return HEAD + '\n'.join(rows) + '\n' + missing + '\n' + made_of(records) + '\n', wrong


def made_of(records: list[dict]) -> str:
  """When, from what, on what."""
  times = [row['time'] for row in records]
  day = datetime.datetime.fromtimestamp(max(times), datetime.UTC).date().isoformat()
  versions = ', '.join(f'{name} {importlib.metadata.version(name)}' for name in PACKAGES)
  minutes = (max(times) - min(times)) / 60
  return (f'Of {day}, {minutes:.0f} minutes from the first record to the last on {os.cpu_count()} cores '
          f'({platform.machine()}, Linux {platform.release().partition("-")[0]}), Python {platform.python_version()}, '
          f'{versions}, commit {commit()}.')


def commit() -> str:
  """What git says of the tree; 'unknown' where there is no git."""
  words = ['git', 'describe', '--always', '--dirty', '--exclude=*']
  try: return subprocess.run(words, cwd=README.parent, capture_output=True, text=True, check=True).stdout.strip()
  except (OSError, subprocess.CalledProcessError): return 'unknown'


def main(folder: str) -> int:
  records = tried.read(folder)
  if not records:
    print(f'{folder} holds no records: run make faults', file=sys.stderr)
    return 1
  text, wrong = page(records)
  README.write_text(text)
  for line in wrong: print(line, file=sys.stderr)
  return bool(wrong)


if __name__ == '__main__': sys.exit(main(sys.argv[1]))
