"""A ledger is what was put in, in order, one row a stage; what was not measured is never shown as a number."""
import dataclasses
import io
import json
import math

import pytest
import rich.console

from efficient_lm.errors import WriteError
from efficient_lm.runs import ledger
from efficient_lm.runs.ledger import Effort, Origin, Quality, Row, Size, Speed

FULL = Row(
  stage='train', quality=Quality(bits_per_byte=1.25, perplexity=5.5, baselines={'xz': 2.0}),
  size=Size(parameters=12_345_678, active_parameters=2_000_000, bytes_on_disk=2 ** 20, bytes_in_memory=3 * 2 ** 20,
            flops_per_token=4e6),
  speed=Speed(tokens_per_second=1234.0, latency_seconds=0.0031, peak_memory_bytes=2 ** 30, memory_source='device memory'),
  effort=Effort(steps=10, tokens=100, wall_seconds=3725.0, joules_per_token=0.01, energy_source='NVML, 1 GPU'),
  origin=Origin(hardware='1 x NVIDIA H100', versions={'jax': '1'}, corpus_hash='ab', seed=3), notes=('2:4',))


def text_of(table, width=80) -> str:
  console = rich.console.Console(file=io.StringIO(), width=width)
  console.print(table)
  return console.file.getvalue()


def test_reading_is_the_inverse_of_writing(tmp_path):
  ledger.write(tmp_path, [FULL, Row(stage='prune')])
  assert ledger.read(tmp_path / 'ledger.json') == [FULL, Row(stage='prune')]


def test_a_failed_write_leaves_the_old_ledger(tmp_path, monkeypatch):
  ledger.write(tmp_path, [FULL])
  monkeypatch.setattr('os.replace', lambda *paths: (_ for _ in ()).throw(OSError('killed')))
  with pytest.raises(WriteError, match=r'ledger\.json cannot be written: .* bytes free'):
    ledger.write(tmp_path, [Row(stage='prune')])
  assert ledger.read(tmp_path / 'ledger.json') == [FULL]


@pytest.mark.parametrize('value', [math.nan, math.inf, -math.inf])
def test_a_number_that_is_not_finite_is_null_and_a_note_says_what_it_was(tmp_path, value):
  ledger.write(tmp_path, [dataclasses.replace(FULL, quality=Quality(perplexity=value, baselines={'xz': value}))])
  entry, = json.loads((tmp_path / 'ledger.json').read_text(), parse_constant=pytest.fail)   # NaN, Infinity: no JSON
  assert entry['quality']['perplexity'] is None and entry['quality']['baselines']['xz'] is None
  assert entry['notes'] == [
    '2:4', f'quality.perplexity is not finite: {value}', f'quality.baselines.xz is not finite: {value}']
  assert ledger.read(tmp_path / 'ledger.json')[0].quality.perplexity is None


def test_a_ledger_of_another_version_is_read(tmp_path):
  entry = dataclasses.asdict(FULL)
  entry['size']['bits_per_weight'], entry['carbon'] = 4, {}
  del entry['speed'], entry['quality']['perplexity']
  entry['quality']['yardsticks'] = entry['quality'].pop('baselines')
  (tmp_path / 'ledger.json').write_text(json.dumps([entry]))
  row, = ledger.read(tmp_path / 'ledger.json')
  assert row.size == FULL.size and row.quality.baselines == {'xz': 2.0}
  assert row.speed == Speed() and row.quality.perplexity is None


@pytest.mark.parametrize('content', ['', '{"a": 1}', '[1]', '[{}]', 'null'])
def test_what_is_no_ledger_is_named(tmp_path, content):
  (tmp_path / 'ledger.json').write_text(content)
  with pytest.raises(ValueError, match=r'ledger\.json is no ledger'): ledger.read(tmp_path / 'ledger.json')


def entries(folder): return json.loads((folder / 'ledger.json').read_text())


@pytest.mark.parametrize('change', [{'stage': 'other'}, {'quality': {'perplexity': 5.6}}, {'notes': ['one']}, {'crc32': 3},
                                    {'crc32': 'x'}])
def test_a_row_that_was_changed_is_left_out_with_a_warning_and_the_others_stay(tmp_path, caplog, change):
  rows = [FULL, Row(stage='prune'), Row(stage='quantize')]
  ledger.write(tmp_path, rows)
  changed = entries(tmp_path)
  changed[1] |= change
  (tmp_path / 'ledger.json').write_text(json.dumps(changed))
  assert ledger.read(tmp_path / 'ledger.json') == [rows[0], rows[2]]
  warned, = caplog.messages
  assert warned.endswith('has 1 damaged rows, which are left out') and str(tmp_path / 'ledger.json') in warned
  del changed[1]['crc32']
  (tmp_path / 'ledger.json').write_text(json.dumps(changed))
  assert ledger.read(tmp_path / 'ledger.json') == [rows[0], rows[2]], 'one without a checksum among others that have one'
  ledger.write(tmp_path, rows)
  assert ledger.read(tmp_path / 'ledger.json') == rows
  assert json.loads((tmp_path / 'ledger.json.damaged').read_text()) == changed


@pytest.mark.parametrize('size', [{'parameters': 'x'}, {'parameters': True}, {'parameters': 10 ** 400},
                                  {'bits_per_parameter': []}])
def test_a_row_of_an_earlier_version_must_hold_what_a_row_holds(tmp_path, size):
  rows = [{'stage': 'a'}, {'stage': 'b', 'size': size}, {'stage': 'c', 'notes': 3}]
  (tmp_path / 'ledger.json').write_text(json.dumps(rows))
  assert ledger.read(tmp_path / 'ledger.json') == [Row(stage='a')]


def test_the_table_fits_a_terminal_and_names_hardware_and_energy_source():
  text = text_of(ledger.table({'moe / train': FULL, 'moe / prune': dataclasses.replace(FULL, stage='prune')}))
  for part in ('1.250', '12.3 M', '1 MiB', '3.1 ms', '1 h 2 min', 'NVIDIA H100', 'NVML, 1 GPU'): assert part in text
  assert '…' not in text and max(map(len, text.splitlines())) <= 80


def test_what_nobody_measured_has_no_line_and_what_one_lacks_is_a_dash():
  text = text_of(ledger.table({'a': Row(stage='a', quality=Quality(bits_per_byte=1.5)),
                               'b': Row(stage='b', size=Size(parameters=10))}))
  assert 'latency' not in text and 'bits/byte' in text and '–' in text
  text_of(ledger.table({}))


@pytest.mark.parametrize('value, text', [
  (None, '–'), (0, '0'), (950, '950'), (999, '999'), (1000, '1 k'), (12_345, '12.3 k'), (999_400, '999 k'), (999_600, '1 M'),
  (7e9, '7 G'), (2.5e15, '2.5 P')])
def test_quantities(value, text):
  assert ledger.quantity(value) == text


def test_bytes_and_durations():
  assert [ledger.quantity(value, 'B', 1024) for value in (512, 1023, 1024, 1536 * 1024)] == [
    '512 B', '1023 B', '1 KiB', '1.5 MiB']
  assert [ledger.duration(value) for value in (None, 2.5e-4, 0.0032, 41, 725, 12_000)] == [
    '–', '250 us', '3.2 ms', '41 s', '12 min 5 s', '3 h 20 min']


def test_no_group_has_more_than_eight_fields():
  assert all(len(dataclasses.fields(kind)) <= 8 for kind in (Row, *ledger.GROUPS.values()))


def test_hardware_and_versions_say_something():
  assert ledger.hardware() and set(ledger.versions()) == {'python', *ledger.PACKAGES}
