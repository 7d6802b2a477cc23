"""Sensitivity falls with bits, the plan keeps to its budget, and reads back as what it is."""
import functools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from efficient_lm import tree
from efficient_lm.compression.rules import Rule
from efficient_lm.compression.search import Sensitivity, choose, divergence, pasted, sensitivities, together
from efficient_lm.errors import IncompatibleError
from efficient_lm.formats import NF4, Group, Int, MidRise
from efficient_lm.techniques.quantization.ptq import Quantize
from efficient_lm.weights.quantized import Quantized
from efficient_lm.weights.weight import Weight
from tests.compressing import Context, batch_of, masked_once, model_of

pytestmark = pytest.mark.usefixtures('quick_compilation')

FORMATS = tuple(Int(bits=bits, scales=Group(size=8)) for bits in (2, 4, 8))


@functools.cache
def found():
  return sensitivities(model_of(), [batch_of()], FORMATS, where='(query|up|down)$')


def test_each_weight_does_less_harm_in_more_bits():
  assert len(found()) == 9
  for path in {one.path for one in found()}:
    two, four, eight = (one for one in found() if one.path == path)
    assert two.divergence > four.divergence > eight.divergence > 0
    assert two.num_bytes < four.num_bytes < eight.num_bytes
    # A bit more halves the step: 6.02 dB; of two bits more, 12, within what grids of so few levels differ by.
    assert 8 < (four.sqnr - two.sqnr) / 2 + 2 < 16 and 20 < eight.sqnr - four.sqnr < 29


def stored(plan):
  model, _ = Quantize(rules=plan)(model_of(), Context())
  return sum(tree.num_bytes(weight) for _, weight in tree.select(model, Quantized))


def test_the_plan_keeps_to_its_budget_and_spends_it_where_it_helps():
  least = sum(one.num_bytes for one in found() if one.format == FORMATS[0])
  most = sum(one.num_bytes for one in found() if one.format == FORMATS[2])
  plans = {budget: choose(found(), budget) for budget in (least, (least + most) // 2, most)}
  for budget, plan in plans.items(): assert stored(plan) <= budget
  assert {rule.weights for rule in plans[least]} == {FORMATS[0]} and {rule.weights for rule in plans[most]} == {FORMATS[2]}
  harm = lambda plan: sum(one.divergence for rule in plan for one in found()
                          if one.format == rule.weights and rule.where == f'^{one.path}$')
  assert harm(plans[least]) > harm(plans[(least + most) // 2]) > harm(plans[most])
  with pytest.raises(ValueError, match=f'{least - 1} bytes are too few: the smallest formats take {least}'):
    choose(found(), least - 1)


def test_a_plan_as_a_whole_is_measured_as_it_would_be_stored():
  size, harm = together(model_of(), [batch_of()], plan := choose(found(), 10 ** 9))
  assert size == stored(plan) and harm > 0
  one = next(one for one in found() if one.format == FORMATS[0])
  size, harm = together(model_of(), [batch_of()], (Rule(where=f'^{one.path}$', weights=one.format),))
  assert (size, harm) == (one.num_bytes, one.divergence), 'of a single weight it is its sensitivity'


def test_a_byte_goes_to_the_weight_that_gains_most_by_it():
  made = [Sensitivity(path, format, size, 0., harm) for path, format, size, harm in (
    ('a', FORMATS[0], 10, 1.0), ('a', FORMATS[1], 20, 0.5), ('b', FORMATS[0], 10, 3.0), ('b', FORMATS[1], 20, 1.0))]
  assert [rule.weights for rule in choose(made, 30)] == [FORMATS[0], FORMATS[1]]


SIZES_AND_HARMS = st.lists(st.tuples(st.integers(1, 4), st.integers(0, 5)), min_size=1, max_size=5)


@given(st.lists(SIZES_AND_HARMS, min_size=1, max_size=3), st.integers(0, 8))
@settings(deadline=None, max_examples=200)
def test_no_weight_could_do_less_harm_in_as_few_bytes(weights, room):
  """Of formats of equally many bytes the best is chosen, in whatever order they were listed."""
  made = [Sensitivity(f'w{i}', (i, j), size, 0., float(harm))
          for i, choices in enumerate(weights) for j, (size, harm) in enumerate(choices)]
  least = sum(min(size for size, _ in choices) for choices in weights)
  picked = [next(one for one in made if one.format == rule.weights) for rule in choose(made, least + room)]
  assert sum(one.num_bytes for one in picked) <= least + room
  for one in picked:
    assert not [other for other in made if other.path == one.path and other.num_bytes <= one.num_bytes
                and other.divergence < one.divergence]


def test_a_plan_of_mixed_formats_with_equal_bytes_takes_the_best_of_each():
  """Measured: four bits in integers and in NF4, per group of 8, are equally many bytes; either may be the better one."""
  formats = (Int(bits=4, scales=Group(size=8)), NF4(scales=Group(size=8)))
  for order in (formats, formats[::-1]):
    measured = sensitivities(model_of(), [batch_of()], order, where='(query|value|up|down)$')
    best = {path: min((one for one in measured if one.path == path), key=lambda one: one.divergence)
            for path in {one.path for one in measured}}
    assert len({one.num_bytes for one in measured if one.path == measured[0].path}) == 1
    assert {rule.where: rule.weights for rule in choose(measured, 10 ** 9)} == {
      f'^{path}$': one.format for path, one in best.items()}
  assert {one.format for one in best.values()} == set(formats), 'the example has both'


@pytest.mark.parametrize('size, up, down', [(7, 4, 5), (12, 8, 8), (128, 32, 40)])
def test_groups_that_do_not_divide_a_weight_are_fitted_to_it(size, up, down):
  """To the 32 inputs of one and the 40 of the other, as the stage fits them: the plan is what is stored."""
  measured = sensitivities(model_of(), [batch_of()], (Int(bits=4, scales=Group(size=size)),), where='(up|down)$')
  found = {one.path: one.format.scales.size for one in measured}
  assert found == {'stacks/0/blocks/mlp/up': up, 'stacks/0/blocks/mlp/down': down}
  assert stored(choose(measured, 10 ** 9)) == sum(one.num_bytes for one in measured)


@pytest.mark.parametrize('format', [Int(bits=4), MidRise()], ids=lambda one: one.name)
def test_a_pruned_weight_is_measured_with_its_zeros(format):
  """In a format that has none, too, as the stage stores it: with the mask around it, whose bytes count."""
  pruned = tree.rewrite(model_of(), Weight, lambda _, weight: masked_once(weight, 0.5), 'up$')
  one, = sensitivities(pruned, [batch_of()], (format,), where='up$')
  kept, _ = Quantize(rules=(Rule(where='up$', weights=format),))(pruned, Context())
  weight = dict(tree.select(kept, Weight))[one.path]
  assert one.num_bytes == tree.num_bytes(weight)
  assert one.divergence == pytest.approx(divergence(pruned, kept, [batch_of()]), rel=1e-3)   # the same numbers, stored
  noise = np.sum(np.square(weight.materialize() - dict(tree.select(pruned, Weight))[one.path].materialize()))
  signal = np.sum(np.square(dict(tree.select(pruned, Weight))[one.path].materialize()))
  assert one.sqnr == pytest.approx(10 * np.log10(signal / noise), abs=1e-3)


def test_the_printed_plan_is_the_plan():
  plan = choose(found(), 10 ** 9)
  assert eval(pasted(plan), {'Rule': Rule, 'Int': Int, 'Group': Group}) == plan


def test_no_data_and_no_weight_are_refused():
  with pytest.raises(ValueError, match=r'^calibration has no data'): sensitivities(model_of(), [], FORMATS)
  with pytest.raises(ValueError, match="matches 'blcoks'"): sensitivities(model_of(), [batch_of()], FORMATS, 'blcoks')


def test_what_is_in_few_bits_already_is_refused():
  model, _ = Quantize(rules=(Rule(where='up$', weights=FORMATS[1]),))(model_of(), Context())
  with pytest.raises(IncompatibleError, match='stacks/0/blocks/mlp/up is stored as int4 per group of 8 already'):
    sensitivities(model, [batch_of()], FORMATS, 'up$')


def test_measuring_leaves_the_model_as_it_was():
  before = [np.array(leaf) for leaf in jax.tree.leaves(model_of())]
  found()
  for a, b in zip(before, jax.tree.leaves(model_of()), strict=True): np.testing.assert_array_equal(a, b)
