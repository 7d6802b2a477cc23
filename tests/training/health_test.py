"""Sane is better than a uniform guess, and not half of what was learned lost; absurd is far worse for long."""
import math

import pytest

from efficient_lm.errors import NonFinite
from efficient_lm.training import health
from efficient_lm.training.health import Health, advised

UNIFORM = math.log(8)


def judged(*windows, lowest=math.inf) -> list[bool]:
  """Whether the state saved after each of these windows of losses was sane."""
  made, found = Health(UNIFORM, lowest), []
  for losses in windows:
    for loss in losses: made.see({'cross_entropy': loss})
    found.append(made.sane_loss() is not None)
  return found


@pytest.mark.parametrize('losses, sane', [
  ([2.5, 2.3], False), ([UNIFORM] * 5, False), ([UNIFORM - 1e-4], False), ([1.5], True), ([1.5, 9.0, 1.5], True),
  ([], False), ([math.nan], False), ([1.0, math.inf, 1.0], False),
])
def test_one_window(losses, sane):
  """One spike is none; losses that never fell below a uniform guess are those of a model that has learned nothing."""
  assert judged(losses) == [sane]


def test_a_model_that_forgets_half_is_not_sane_until_it_has_learned_it_again():
  assert judged([1.0], [1.5], [1.6], [UNIFORM], [1.5]) == [True, True, False, False, True]
  assert judged([1.6], lowest=1.0) == [False], 'what was saved before a restart counts'


def test_a_window_is_judged_by_itself():
  assert judged([9.0] * 50, [1.0]) == [False, True]
  made = Health(UNIFORM)
  made.see({'cross_entropy': 1.25, 'loss': 99.0})
  assert made.sane_loss() == 1.25, 'of the task, whatever else is minimised'


def test_what_is_saved_is_borne_out_by_the_first_loss_that_follows():
  made = Health(UNIFORM)
  made.see({'loss': 1.0})
  for losses, borne_out in (([], None), ([1.1, 9.0], True), ([9.0, 1.1], False), ([math.nan], False)):
    made.sane_loss()
    for loss in losses: made.see({'loss': loss})
    assert made.is_borne_out() is borne_out, losses
  made.sane_loss()
  made.see({'loss': 9.0, 'skipped_in_a_row': 1})
  assert made.is_borne_out() is None, 'a refused step says nothing'


def test_refused_steps_tell_nothing():
  made = Health(UNIFORM)
  for loss in [1.0] + [1e9] * 50: made.see({'cross_entropy': loss, 'skipped_in_a_row': int(loss > 1)})
  assert not made.is_lost() and made.sane_loss() == 1.0


@pytest.mark.parametrize('loss, lost', [(2 * UNIFORM + 4, False), (2 * UNIFORM + 6, True), (math.nan, True)])
def test_only_what_is_absurd_for_long_is_lost(loss, lost):
  made = Health(UNIFORM)
  for _ in range(health.MAX_ABSURD - 1): made.see({'loss': loss})
  assert not made.is_lost()
  made.see({'loss': loss})
  assert made.is_lost() == lost
  made.see({'loss': 1.0})
  assert not made.is_lost()


def test_without_anything_to_compare_with_nothing_is_absurd():
  made = Health()
  for _ in range(99): made.see({'loss': 1e30})
  assert not made.is_lost() and made.sane_loss() == 1e30


def test_the_line_says_from_where_to_go_on():
  for step, said in ((7, 'step 7, is kept in runs/x'), (None, 'no state was saved')):
    with pytest.raises(NonFinite, match=rf'^diverged; .*{said}.*; lower the learning rate'), advised('runs/x', lambda: step):
      raise NonFinite('diverged')
  with pytest.raises(ValueError, match=r'^other$'), advised('runs/x', lambda: 7): raise ValueError('other')
