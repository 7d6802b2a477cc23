"""Calibration: statistics of the whole model in one gradient, and of layers on what they are given."""
import os
import subprocess
import sys

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
from tests.compressing import B, D, T, V, batch_of, family, logits_of, model_of

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


def test_padding_counts_for_nothing_though_biases_make_something_of_it():
  """The second half of each row is padding, or is not there."""
  model, batch = family('plain'), batch_of()
  padded = batch | {'segments_BT': np.where(batch['segments_BT'] == 1, 1, 0)}
  half = {key: rows[:, :T // 2] for key, rows in batch.items()}
  wanted = {path: ('gram', 'peak', 'count') for path, _ in tree.select(model, Weight, 'stacks/')}
  found = calibration.statistics(model, [padded], wanted)
  assert_close(found, calibration.statistics(model, [half], wanted))
  assert all(np.all(one['count'] == B * T // 2) for one in found.values())


def test_the_walk_over_a_repeated_pattern_goes_layer_by_layer_and_keeps_the_pattern():
  model, seen = family('pattern'), []

  def change(path, layer, hidden):
    seen.append(path)
    return layer, calibration.advance(layer, hidden)
  changed = calibration.layer_by_layer(model, [batch_of()], change)
  assert seen == ['stacks/0/blocks/0', 'stacks/0/blocks/1'] * 2
  assert jax.tree.structure(changed) == jax.tree.structure(model)
  for a, b in zip(jax.tree.leaves(changed), jax.tree.leaves(model), strict=True): np.testing.assert_array_equal(a, b)
  wanted = {path: ('gram',) for path, _ in tree.select(model, Weight, 'stacks/')}
  apart = {path: ('gram',) for path, _ in tree.select(unrolled(model), Weight, 'stacks/')}
  stacked = calibration.statistics(model, [batch_of()], wanted)
  single = calibration.statistics(unrolled(model), [batch_of()], apart)
  path = 'stacks/0/blocks/{}/mlp/down'
  for i in range(4):
    one, other = stacked[path.format(i % 2)]['gram'][i // 2], single[path.format(i)]['gram']
    np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)


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


ALL = ('gram', 'magnitude', 'peak', 'count')


def padded(batch, count: int, where: str, seed: int = 5):
  """The batch with `count` tokens of padding, segment 0, drawn at random, before or after each row."""
  noise = np.random.default_rng(seed).integers(0, V, (B, count)).astype(np.int32)
  pads = {'inputs_BT': noise, 'targets_BT': noise, 'positions_BT': 0 * noise, 'segments_BT': 0 * noise}
  order = (lambda a, b: (a, b)) if where == 'after' else (lambda a, b: (b, a))
  return {name: np.concatenate(order(batch[name], pads[name]), 1) for name in batch}


@pytest.mark.thinned
@pytest.mark.parametrize('kinds', [('grouped', 'dense'), ('grouped', 'experts'), ('latent', 'dense')], ids=str)
@pytest.mark.parametrize('where', ['before', 'after'])
def test_padding_enters_no_statistic(kinds, where):
  """Of any weight, experts included, whatever the padded tokens are and however many."""
  model = model_of(*kinds)
  wanted = {path: ALL for path, _ in tree.select(model, Weight, 'stacks/')}
  found = {count: calibration.statistics(model, [padded(batch_of(), count, where)], wanted) for count in (3, 48)}
  without = calibration.statistics(model, [batch_of()], wanted)
  for count in found:
    assert_close(found[count], without)
    for path in wanted: np.testing.assert_array_equal(found[count][path]['count'], without[path]['count'], err_msg=path)
  other = calibration.statistics(model, [padded(batch_of(), 3, where, seed=6)], wanted)
  for path in other:
    for name in ALL: np.testing.assert_array_equal(other[path][name], found[3][path][name], err_msg=f'{path} {name}')
  assert calibration.num_tokens([padded(batch_of(), 48, where)]) == B * T


def test_a_batch_of_padding_alone_adds_nothing():
  model, empty = model_of(mlp='experts'), batch_of(1)
  empty['segments_BT'] = 0 * empty['segments_BT']
  wanted = {path: ALL for path, _ in tree.select(model, Weight, 'stacks/')}
  both, alone = (calibration.statistics(model, batches, wanted) for batches in ([batch_of(), empty], [batch_of()]))
  for path in wanted:
    for name in ALL: np.testing.assert_array_equal(both[path][name], alone[path][name], err_msg=f'{path} {name}')


PEAK = """
import jax
import numpy as np
from flax import nnx
from efficient_lm import tree
from efficient_lm.compression import calibration
from efficient_lm.models import spec
from efficient_lm.weights.weight import Weight
from efficient_lm.parallel.sharding import single_device_mesh
layers, rows, length = {layers}, 8, 512
stack = spec.Stack(num_layers=layers, attention=spec.GroupedQuery(num_heads=2, num_kv_heads=2, head_dim=16),
                   mlp=spec.SwiGLU(hidden=2048))
model = spec.Transformer(vocab_size=32, dim=32, stacks=(stack,)).build(rngs=nnx.Rngs(0))
place = np.tile(np.arange(length, dtype=np.int32), (rows, 1))
batch = dict(inputs_BT=place % 32, targets_BT=place % 32, positions_BT=place, segments_BT=place * 0 + 1)
wanted = {{path: ('peak',) for path, _ in tree.select(model, Weight, 'stacks/')}}
found = calibration.statistics(model, [batch], wanted)
status = open('/proc/self/status').read()
print(int(status.partition('VmHWM:')[2].split()[0]) // 1024)
"""


@pytest.mark.skipif(not os.path.exists('/proc/self/status'), reason='needs /proc, where Linux keeps the peak of a process')
def test_statistics_of_twelve_layers_need_the_memory_of_one():
  """The inputs of a layer's products, 8 x 512 tokens of 2048 hidden units, are 32 MiB and more a layer: kept for a backward
  pass of all of them, they would be 350 MiB more."""
  def peak(layers):
    ran = subprocess.run([sys.executable, '-c', PEAK.format(layers=layers)], capture_output=True, text=True, check=True)
    return int(ran.stdout.split()[-1])
  # Half of that: a process returns freed memory when it likes, which moves its peak by up to 100 MiB from run to run.
  assert peak(13) - peak(2) < 175


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
