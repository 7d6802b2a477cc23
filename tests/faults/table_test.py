"""What tests record of faults, and the page that is made of it."""
import types

import pytest

from tests import tried as records
from tests.faults import table


def recorded(folder, *rows):
  for row in rows: records.Records(folder).add(*row, 'tests/faults/some_test.py::test_it[case]')
  return records.read(folder)


def test_records_of_one_fault_are_added_up(tmp_path):
  rows = recorded(tmp_path, ('a', 2, {'noticed': 2}), ('b', 1, {}), ('a', 3, {'noticed': 1, 'harmless': 2}))
  found = records.merged(rows)
  test = 'tests/faults/some_test.py::test_it'
  assert found['a'] == {'tries': 5, 'outcomes': {'noticed': 3, 'harmless': 2}, 'tests': [test]}
  assert found['b']['tries'] == 1


def test_without_a_folder_nothing_is_written(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  records.Records(None).add('a', 1, {}, 'test')
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('when, outcome, counted', [
  ('setup', 'passed', None), ('call', 'passed', 'fine'), ('teardown', 'passed', None), ('call', 'failed', records.FAILED),
  ('setup', 'failed', records.FAILED), ('teardown', 'failed', records.FAILED), ('setup', 'skipped', None),
  ('call', 'skipped', None)])
def test_a_marked_case_counts_once_it_has_passed_and_when_it_fails(when, outcome, counted):
  report = types.SimpleNamespace(when=when, failed=outcome == 'failed', skipped=outcome == 'skipped')
  found = records.of_case(report, [types.SimpleNamespace(args=('a fault', 'fine'))])
  assert found == ([('a fault', 1, {counted: 1})] if counted else [])
  found = records.of_case(report, [], tells=True)
  assert found == ([('a test that failed', 1, {records.FAILED: 1})] if counted == records.FAILED else [])


def test_the_page_has_a_row_for_each_fault_and_says_what_was_not_tried_or_failed(tmp_path):
  first, second, *missing = table.FAULTS
  rows = recorded(tmp_path, (first, 1234, {'noticed': 1200, 'harmless': 34}), (second, 1, {records.FAILED: 1}),
                  ('new', 1, {}))
  text, wrong = table.page(rows)
  assert f'| {first} | 1,234 | 1,200 noticed, 34 harmless | `faults/some_test` |' in text and '| new | 1 |' in text
  assert wrong == [f'failed: {second}', *(f'not tried: {fault}' for fault in missing)]
  assert all(line in text for line in wrong)


def test_whole_is_a_page_of_which_nothing_failed(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(table, 'README', tmp_path / 'README.md')
  assert table.main(str(tmp_path / 'none')) == 1 and 'no records' in capsys.readouterr().err
  recorded(tmp_path, *((fault, 1, {'noticed': 1}) for fault in table.FAULTS))
  assert table.main(str(tmp_path)) == 0 and capsys.readouterr().err == ''
  text = (tmp_path / 'README.md').read_text()
  assert text.count('| 1 noticed |') == len(table.FAULTS) and 'jax ' in text and 'commit ' in text


def test_every_fault_of_the_page_is_named_by_a_test():
  """And no test records one that is not a row of it."""
  tests = table.README.parent.parent.rglob('*_test.py')
  source = ''.join(path.read_text() for path in tests if path.name != 'table_test.py')
  for fault in table.FAULTS: assert f"'{fault}'" in source, fault
