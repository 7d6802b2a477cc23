"""What tests of faults have tried, and what came of it: a record of each, from which `tests/faults/table.py` makes a table.

A test that tries many things says so at its end, by the fixture `tried`. One whose cases are tried one by one has the marker
`fault(name, outcome)`: each case that passes is a try which had that outcome, each that fails one that had not.
"""
import collections
import json
import os
import pathlib
import time

OPTION = '--tried'
FAILED = 'FAILED'


class Records:
  """Of one process: a file of its own in `folder`, a line for each record; without a folder nothing is written."""

  def __init__(self, folder: str | None):
    worker = os.environ.get('PYTEST_XDIST_WORKER', 'main')
    self.file = pathlib.Path(folder) / f'{worker}.jsonl' if folder else None

  def add(self, fault: str, tries: int, outcomes: dict[str, int], test: str):
    """A line. Outcomes are counted; they need not be as many as the tries."""
    if self.file is None: return
    self.file.parent.mkdir(parents=True, exist_ok=True)
    row = {'fault': fault, 'tries': tries, 'outcomes': outcomes, 'test': test, 'time': time.time()}
    with self.file.open('a') as out: out.write(json.dumps(row) + '\n')


def of_case(report, markers, tells: bool = False) -> list[tuple[str, int, dict[str, int]]]:
  """What a case with markers `fault` adds, once it has been called: nothing where it was skipped. tells: whether it has the
  fixture `tried`, and would have said itself what it tried, had it not failed."""
  if report.skipped or (report.when != 'call' and not report.failed): return []
  if tells and report.failed: return [('a test that failed', 1, {FAILED: 1})]
  return [(name, 1, {FAILED if report.failed else outcome: 1}) for name, outcome in (marker.args for marker in markers)]


def read(folder) -> list[dict]:
  """All records of a folder, in the order of their time."""
  lines = [line for file in pathlib.Path(folder).glob('*.jsonl') for line in file.read_text().splitlines()]
  return sorted(map(json.loads, lines), key=lambda row: row['time'])


def merged(records: list[dict]) -> dict[str, dict]:
  """By fault: tries, outcomes and tests of all its records together."""
  found = {}
  for row in records:
    one = found.setdefault(row['fault'], {'tries': 0, 'outcomes': collections.Counter(), 'tests': []})
    one['tries'] += row['tries']
    one['outcomes'].update(row['outcomes'])
    test = row['test'].split('[')[0]
    if test not in one['tests']: one['tests'].append(test)
  return found
