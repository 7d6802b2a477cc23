"""Joules from counters that run since the machine was started, and may wrap around."""
from efficient_lm.runs import energy
from efficient_lm.runs.energy import Energy


def test_energy_is_a_number_only_with_a_source():
  meter = Energy()
  joules = meter.joules()
  assert (joules is None) == meter.source.startswith('none')


def test_counters_may_wrap(monkeypatch):
  readings = iter([90.0, 95.0, 5.0])
  monkeypatch.setattr(energy, '_rapl', lambda: ([(lambda: next(readings), 100.0)], 'a counter'))
  meter = Energy()
  assert (meter.joules(), meter.joules()) == (5.0, 15.0) and meter.source == 'a counter'
