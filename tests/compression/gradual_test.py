"""When masks are drawn, and how many of the zeros they have by then."""
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from efficient_lm.compression.gradual import AtOnce, Cubic, Periodic


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 30), st.integers(1, 30), st.integers(1, 12))
def test_every_schedule_begins_with_nothing_and_has_all_of_it_at_its_last_drawing(start, length, every):
  end, steps = start + length, np.arange(1, 70)
  for schedule in (Cubic(), AtOnce(), Periodic()):
    ramp, drawn = np.asarray(schedule.ramp(steps, start, end)), steps[schedule.due(steps, start, end, every)]
    assert drawn.max() == end and drawn.min() > start and np.all(np.diff(ramp) >= 0)
    assert ramp[steps == end] == 1 and np.all(ramp[steps <= start] == 0)


@pytest.mark.parametrize('schedule, drawn, ramps', [
  (Cubic(), [3, 5], [0.936, 1]), (AtOnce(), [5], [1]), (Periodic(), [3, 5], [1, 1])])
def test_from_0_to_5_every_3_steps(schedule, drawn, ramps):
  assert [step for step in range(1, 9) if schedule.due(step, 0, 5, 3)] == drawn
  np.testing.assert_allclose([schedule.ramp(step, 0, 5) for step in drawn], ramps, rtol=1e-6)   # float32
