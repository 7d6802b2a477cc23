"""Names in a picture of quality against cost can be read where points lie close together."""
import numpy as np

from efficient_lm.runs.charts import draw_series, label_places, svg


def boxes(names, fractions):
  """(left, right, bottom, top) of each name, in points of type, in a plot of 280 x 190."""
  points, places = np.asarray(fractions) * (280, 190), label_places(names, fractions)
  for name, (x, y), (side, rise) in zip(names, points, places, strict=True):
    left = x + 6 if side > 0 else x - 6 - 4.7 * len(name)
    yield left, left + 4.7 * len(name), y + rise - 5, y + rise + 5


def test_names_of_points_that_coincide_do_not_cross():
  rng = np.random.default_rng(0)
  for spread in (0., 0.01, 0.1, 0.5):
    for count in (2, 5):
      fractions = np.clip(0.5 + spread * rng.normal(size=(count, 2)), 0.05, 0.95)
      found = list(boxes(['4 convert'] * count, fractions))
      for i, a in enumerate(found):
        for b in found[:i]: assert not (a[0] < b[1] and b[0] < a[1] and a[2] < b[3] and b[2] < a[3])


def test_a_name_at_the_border_stands_inside():
  for x in (0.01, 0.99):
    ((left, right, *_),) = boxes(['quantized'], [(x, 0.5)])
    assert left >= 0 and right <= 280


def test_a_name_on_its_own_stands_right_below_its_point():
  assert label_places(['moe'], [(0.5, 0.5)]) == [(1, -6)]


def test_a_number_that_does_not_change_is_the_one_mark_of_its_axis():
  for value in (0., 8., 1e9):
    text = svg(lambda plot, value=value: draw_series(plot, 'name', [(np.arange(3), np.full(3, value))]), 2.6, 1.6)
    assert '>' + {0.: '0', 8.: '8', 1e9: '1G'}[value] + '<' in text and 'm<' not in text


def test_a_picture_is_the_same_each_time_it_is_drawn():
  """So that the report of a run is, too, in another process as well."""
  draw = lambda plot: draw_series(plot, 'name', [(np.arange(3), np.arange(3))])
  assert svg(draw, 2.6, 1.6) == svg(draw, 2.6, 1.6)
