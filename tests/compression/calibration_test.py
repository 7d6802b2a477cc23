"""Calibration: statistics of the whole model in one gradient, and of layers on what they are given."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_lm import tree
from efficient_lm.compression import calibration
from efficient_lm.formats import Int
from efficient_lm.models.transformer import Block, unrolled
from efficient_lm.training import trainer as train
from efficient_lm.weights.quantized import round_to_nearest
from efficient_lm.weights.weight import Dense, Weight
from tests.compressing import B, D, T, batch_of, logits_of, model_of

pytestmark = pytest.mark.usefixtures('quick_compilation')

LAYER = 'stacks/0/blocks/'
WANTED = {LAYER + path: ('gram', 'count') for path in ('attention/query', 'attention/output', 'mlp/up', 'mlp/down')}


def assert_close(found, wanted):
  assert set(found) == set(wanted)
  for path in found:
    for name in found[path]:   # some hundred float32 terms, added in another order
      a, b = found[path][name], wanted[path][name]
      np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * np.abs(b).max(), err_msg=f'{path} {name}')


def test_statistics_of_a_model_are_those_of_what_its_weights_read():
  """By hand, of the first layer's queries: the norm of the embedding."""
  model, batch = model_of(), batch_of()
  found = calibration.statistics(model, [batch], WANTED)
  assert set(found) == set(WANTED)
  block = jax.tree.map(lambda leaf: leaf[0], dict(tree.select(model, Block))[LAYER[:-1]])
  x_MD = block.attention_norm(model.embed.take(batch['inputs_BT'])).reshape(-1, D)
  np.testing.assert_allclose(found[LAYER + 'attention/query']['gram'][0], x_MD.T @ x_MD, rtol=1e-3, atol=1e-2)
  assert found[LAYER + 'mlp/down']['gram'].shape[0] == 2 and np.all(found[LAYER + 'mlp/down']['count'] == B * T)


def test_watching_changes_no_output():
  np.testing.assert_array_equal(logits_of(calibration.watch(model_of(), WANTED)), logits_of(model_of()))


def test_batches_add_up_and_any_iterator_will_do():
  model = model_of()
  both = calibration.statistics(model, (batch_of(seed) for seed in (0, 1)), WANTED)
  each = [calibration.statistics(model, [batch_of(seed)], WANTED) for seed in (0, 1)]
  assert_close(both, calibration.join(*each))
  peak = {LAYER + 'mlp/up': ('peak',)}
  both = calibration.statistics(model, [batch_of(0), batch_of(1)], peak)[LAYER + 'mlp/up']['peak']
  each = [calibration.statistics(model, [batch_of(seed)], peak)[LAYER + 'mlp/up']['peak'] for seed in (0, 1)]
  np.testing.assert_allclose(both, np.maximum(*each), rtol=1e-5)


def test_a_batch_over_eight_devices_gives_the_same_sums(mesh):
  """Of dense layers; of experts, see observed_test."""
  model, kinds = model_of(), ('gram', 'magnitude', 'peak', 'count')
  wanted = {path: kinds for path, _ in tree.select(model, Weight, 'query$|down$')}
  alone = calibration.statistics(model, [batch_of()], wanted)
  with mesh(2, 2, 2, 1):
    placed = train.place(batch_of(), jax.sharding.get_mesh())
    assert_close(calibration.statistics(model, [placed], wanted), alone)


def test_layers_one_by_one_see_what_the_whole_model_sees():
  for model in (model_of(), unrolled(model_of())):
    seen = []

    def change(path, layer, hidden):
      seen.append(calibration.layer_statistics(layer, hidden, {'mlp/down': ('gram',)})['mlp/down']['gram'])
      return layer, calibration.advance(layer, hidden)
    same = calibration.layer_by_layer(model, [batch_of(0), batch_of(1)], change)
    whole = calibration.statistics(model_of(), [batch_of(0), batch_of(1)], {LAYER + 'mlp/down': ('gram',)})
    np.testing.assert_allclose(jnp.stack(seen), whole[LAYER + 'mlp/down']['gram'], rtol=1e-3, atol=1e-2)
    assert jax.tree.structure(same) == jax.tree.structure(model)
    for a, b in zip(jax.tree.leaves(same), jax.tree.leaves(model)): np.testing.assert_array_equal(a, b)


def test_a_layer_is_given_what_changed_layers_before_it_put_out():
  """The last layer's output is that of the changed model, found by running it."""
  states = []

  def change(path, layer, hidden):
    layer = tree.rewrite(layer, Weight, lambda _, weight: round_to_nearest(weight, Int(bits=3)))
    states.append(calibration.advance(layer, hidden))
    return layer, states[-1]
  model = calibration.layer_by_layer(model_of(), [batch_of()], change)
  logits_BTV = model.head.contract('BTD,DV->BTV', model.norm(states[-1][0].x_BTD), jnp.float32)
  np.testing.assert_allclose(logits_of(model), logits_BTV, rtol=1e-4, atol=1e-3)


def test_weights_that_read_the_same_rows_are_observed_once():
  first = calibration.sharing(dict(tree.select(model_of(mlp='experts'), Block))[LAYER[:-1]])
  assert first['attention/key'] == first['attention/value'] == first['attention/query'] == 'attention/query'
  assert first['mlp/experts/up'] == 'mlp/experts/gate' and first['mlp/shared/up'] == first['mlp/router'] == 'mlp/router'
  assert first['mlp/experts/down'] == 'mlp/experts/down'


def test_products_take_turns_in_the_order_of_computation():
  layer = dict(tree.select(model_of(), Block))[LAYER[:-1]]
  assert calibration.in_turn(layer, ['mlp/down', 'mlp/up', 'attention/output', 'attention/key', 'attention/query', 'x']) == [
    ['x'], ['attention/key', 'attention/query'], ['attention/output'], ['mlp/up'], ['mlp/down']]


def test_no_data_is_one_clear_line():
  for run in (lambda: calibration.statistics(model_of(), [], WANTED), lambda: calibration.first_batches([], 3),
              lambda: calibration.layer_by_layer(model_of(), [], None)):
    with pytest.raises(ValueError, match=r'^calibration has no data'): run()
  with pytest.raises(ValueError, match='asks for 20 sequences, but the data has 8'):
    calibration.first_batches([batch_of()], 20)
  assert len(calibration.first_batches(iter([batch_of()] * 5), 9)) == 2


def test_inputs_that_are_not_finite_are_named():
  broken = lambda _, weight: Dense(weight.array[...] * jnp.nan, weight.axes, weight.inputs)
  model = tree.rewrite(model_of(), Weight, broken, 'up$')
  with pytest.raises(ValueError, match='mlp/down: its inputs are not finite'):
    calibration.statistics(model, [batch_of()], {LAYER + 'mlp/down': ('gram',)})
