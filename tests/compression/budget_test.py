"""The shapes that a budget allows are those of the grid that cost no more, and each was counted as the model that it is."""
import jax
import pytest

from efficient_lm.compression import latency
from efficient_lm.compression.budget import Budget, Grid
from efficient_lm.compression.dimensions import Removal, counts
from efficient_lm.compression.selection import chosen, unscored
from efficient_lm.compression.shape import Shape
from efficient_lm.errors import IncompatibleError
from efficient_lm.parallel.sharding import single_device_mesh
from efficient_lm.runs import measure
from efficient_lm.tree import num_bytes
from tests.compressing import family, model_of

GRID = Grid(width=(32, 24, 16), hidden=(1.0, 0.5), layers=(2, 1))


@pytest.mark.parametrize('name', ['parameters', 'flops', 'bytes'])
def test_what_is_found_fits_and_nothing_larger_of_the_grid_does(name):
  model = model_of()
  budget = Budget(**{name: 0.6}, grid=GRID, trials=3)
  found, whole = budget.resolve(model), budget.costs(model)[name]
  each = {shape: budget.costs(model, shape)[name] / whole for shape in GRID.shapes()}
  assert len(each) == 12 and len(found) == 3
  assert [each[shape] for shape in found] == sorted((cost for cost in each.values() if cost <= 0.6), reverse=True)[:3]


def test_costs_are_those_of_the_smaller_model():
  model, shape, budget = model_of(mlp='experts'), Shape(width=16, experts=2, heads=0.5), Budget(flops=1.0, sequence_length=8)
  left = counts(model, shape)
  smaller = Removal(model, chosen(model, left, unscored(left)))(model)
  assert budget.costs(model, shape) == dict(parameters=measure.parameters(smaller).total, bytes=num_bytes(smaller),
                                           flops=measure.flops_per_token(smaller, 8).forward)


def test_several_limits_hold_together_and_numbers_count():
  model = jax.eval_shape(lambda: model_of())
  both = Budget(parameters=9000, flops=0.5, grid=GRID, trials=12)
  assert set(both.resolve(model)) == set(Budget(parameters=9000, grid=GRID, trials=12).resolve(model)) & set(
    Budget(flops=0.5, grid=GRID, trials=12).resolve(model))


def test_what_cannot_be_met_is_one_line():
  least = r'no shape of the grid meets parameters = 0.01: the smallest, width=16, layers=1, hidden=0.5, takes \d+% of'
  with pytest.raises(IncompatibleError, match=least): Budget(parameters=0.01, grid=GRID).resolve(model_of())
  with pytest.raises(IncompatibleError, match='experts: the model has none'):
    Budget(parameters=0.9, grid=Grid(experts=(2,))).resolve(family('behind'))


def test_what_reads_fast_enough_is_measured_from_the_first_that_does(monkeypatch):
  """Of shapes by their FLOPs; what a machine would take of them is made up here."""
  budget, model, mesh = Budget(latency=0.6, grid=GRID, trials=2, sequence_length=8), model_of(), single_device_mesh()
  seconds = lambda model: (30 + num_bytes(model) / 1000) / (30 + num_bytes(model_of()) / 1000)
  asked = []
  def share(self, smaller):
    asked.append(smaller)
    return seconds(smaller)
  monkeypatch.setattr(latency.Reading, 'share', share)
  found = budget.resolve(model, mesh)
  assert len(asked) <= 4 + 2, 'twelve shapes are halved, then two taken'
  flops = {shape: budget.costs(model, shape)['flops'] for shape in GRID.shapes()}
  within = [shape for shape in sorted(flops, key=flops.get, reverse=True) if seconds(budget._smaller(model, shape)) <= 0.6]
  assert list(found) == within[:2] and within
  assert budget.notes(model, asked[-1], mesh)[0].startswith(f'reads 8 tokens in {seconds(asked[-1]):.0%} of the seconds')
  with pytest.raises(IncompatibleError, match=r'no shape of the grid meets latency = 0.01: width=16, layers=1.* of the sec'):
    Budget(latency=0.01, grid=GRID, sequence_length=8).resolve(model, mesh)


def test_without_a_machine_flops_stand_for_seconds():
  model = jax.eval_shape(lambda: model_of())
  by = {name: Budget(**{name: 0.6}, grid=GRID, trials=12).resolve(model) for name in ('flops', 'latency')}
  assert by['latency'] == by['flops']
  assert len(Budget(latency=0.001, grid=GRID).resolve(model)) == 1, 'nothing is refused that was not measured'


def test_a_model_takes_as_long_as_itself():
  """Within what a busy machine does to the least of seven."""
  mesh = single_device_mesh()
  with jax.set_mesh(mesh): assert 0.2 < latency.Reading(model_of(), 16, mesh).share(model_of()) < 5


@pytest.mark.parametrize('value, names', [
  (Budget(), ['parameters']), (Budget(parameters=0.0), ['parameters']), (Budget(flops=1.5), ['flops']),
  (Budget(bytes=10 ** 9, trials=0), ['trials']),
  (Budget(latency=2.0), ['latency']), (Budget(latency=0.5), []), (Grid(), ['width']), (Grid(width=(0.5, -1)), ['width[1]']),
  (GRID, [])], ids=str)
def test_a_wrong_field_is_named(value, names):
  assert [name for name, _, _ in value.check()] == names
