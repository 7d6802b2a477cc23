"""Moments in eight bits err by half a cell of their map, take a quarter of the bytes, and train as float32 ones do."""
import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from efficient_lm.config.mesh import Mesh
from efficient_lm.models import spec
from efficient_lm.parallel.sharding import shardings, weight_spec
from efficient_lm.runs.checkpoint import Checkpoints
from efficient_lm.techniques.pruning.prune import Prune
from efficient_lm.training import moments
from efficient_lm.training import trainer as train
from efficient_lm.training.learner import assemble, initial_state
from efficient_lm.training.optimizers import AdamW, WarmupStableDecay
from efficient_lm.tree import num_bytes, path_name

pytestmark = pytest.mark.usefixtures('quick_unless_long')

CONSTANT = WarmupStableDecay(peak=1e-2, warmup=0, decay=0)
KINDS = {'signed': jnp.int8, 'unsigned': jnp.uint8}


def codes(dtype):
  return jnp.arange(-127, 128).astype(dtype) if dtype == jnp.int8 else jnp.arange(256).astype(dtype)


@pytest.mark.parametrize('dtype', KINDS.values(), ids=KINDS)
def test_every_code_stands_for_a_number_of_its_own_that_goes_back_to_it(dtype):
  values = np.asarray(moments.decode(codes(dtype)))
  assert np.all(np.diff(values) > 0) and np.abs(values).max() < 1
  np.testing.assert_array_equal(moments.encode(jnp.asarray(values), dtype), codes(dtype))
  if dtype == jnp.int8: np.testing.assert_array_equal(values, -values[::-1])
  else: assert values[0] == np.float32(1e-8), 'no second moment becomes zero'


@pytest.mark.parametrize('dtype', KINDS.values(), ids=KINDS)
def test_rounding_errs_by_half_a_step_of_the_map_at_most(dtype):
  """A number lies between two of the map's: the step there is their distance, of two unlike steps the larger."""
  values = np.asarray(moments.decode(codes(dtype)), np.float64)
  tried = np.concatenate([10. ** -np.linspace(0, 9, 20_000), [0, 1], np.linspace(0, 1, 20_000)])
  if dtype == jnp.int8: tried = np.concatenate([tried, -tried])
  error = np.abs(np.asarray(moments.decode(moments.encode(jnp.asarray(tried, jnp.float32), dtype)), np.float64) - tried)
  step = np.diff(values)
  left = np.clip(np.searchsorted(values, tried) - 1, 0, len(step) - 1)
  local = np.maximum(step[left], np.maximum(step[np.maximum(left - 1, 0)], step[np.minimum(left + 1, len(step) - 1)]))
  assert np.all(error <= local / 2 * (1 + 1e-5) + 1e-8)
  # The largest numbers, which move the most, to half a cell of the top decade.
  top = np.abs(tried) > 0.1
  assert error[top].max() <= 0.45 / (64 if dtype == jnp.int8 else 128) * (1 + 1e-4)


@pytest.mark.parametrize('dtype', KINDS.values(), ids=KINDS)
def test_a_dithered_number_is_one_of_its_two_neighbours_and_right_on_average(dtype):
  """Over a thousand steps: the dither is even to a thousandth, and so is the share of a step of the map."""
  values, steps = np.asarray(moments.decode(codes(dtype)), np.float64), 1000
  y = 10. ** -np.linspace(0.01, 8, 600)
  if dtype == jnp.int8: y = y * np.where(np.arange(600) % 2, 1, -1)
  @jax.jit
  def rounded(count):
    return moments.decode(moments.encode(jnp.asarray(y, jnp.float32), dtype, moments.dither_of(y.shape, count)))
  found = np.asarray(jax.lax.map(rounded, jnp.arange(steps)), np.float64)
  above = np.clip(np.searchsorted(values, y), 1, len(values) - 1)
  low, high = values[above - 1], values[above]
  # In float32 a code stands for the same number whoever computes it, to its last bits.
  near = np.minimum(np.abs(found - low), np.abs(found - high))
  assert np.all(near <= 1e-6 * np.abs(y) + 1e-12)
  np.testing.assert_array_less(np.abs(found.mean(0) - y), (high - low) * 5 / steps + 1e-6 * np.abs(y))


@pytest.mark.parametrize('shape, letters, block', [
  ((768, 3072), 'DF', (16, 16)), ((12, 768, 2048), 'DF', (1, 16, 16)), ((768, 12, 64), 'DNH', (2, 2, 64)),
  ((12, 64, 768), 'NHD', (2, 64, 2)), ((8, 64, 1024), 'EDF', (1, 16, 16)), ((257, 128), 'VD', (1, 128)),
  ((6, 5), 'DF', (2, 1)), ((3,), 'E', (1,)), ((), '', ())])
def test_a_block_divides_its_array_and_spares_experts_and_layers(shape, letters, block):
  found = moments.block_shape(shape, letters)
  assert found == block
  assert all(size % b == 0 for size, b in zip(shape, found, strict=True)) and np.prod(found) <= 256


def test_blocks_are_rounded_by_themselves():
  """Each keeps its precision beside blocks that are 1e20 times as large, and smaller numbers of its own do not."""
  array = jnp.full((32, 32), 0.3).at[:16, :16].set(1e-20).at[0, 31].set(1e20)
  stored, scale = moments.compress(array, (16, 16), jnp.uint8)
  assert (stored.shape, stored.dtype, scale.shape, scale.dtype) == ((32, 32), jnp.uint8, (2, 2), jnp.float32)
  back = moments.expand(stored, scale, (16, 16))
  np.testing.assert_allclose(back[:, :16], array[:, :16], rtol=0.004)
  np.testing.assert_allclose(back[16:], array[16:], rtol=0.004)
  assert back[0, 31] == pytest.approx(1e20) and back[1, 31] == pytest.approx(1e12, rel=0.004), 'the smallest there is'


def test_a_block_of_zeros_is_zero():
  assert not np.asarray(moments.expand(*moments.compress(jnp.zeros((16, 16)), (16, 16), jnp.uint8), (16, 16))).any()


V, D, B, T = 64, 64, 4, 8


@functools.cache
def model():
  # Matrices of attention are small enough to keep float32 moments, those of the rest are not.
  stack = spec.Stack(num_layers=2, attention=spec.GroupedQuery(num_heads=1, num_kv_heads=1, head_dim=16),
                     mlp=spec.SwiGLU(hidden=64))
  return jax.jit(lambda: spec.Transformer(vocab_size=V, dim=D, stacks=(stack,)).build(rngs=nnx.Rngs(0)))()


def learner(bits, techniques=()):
  return assemble(model(), AdamW(schedule=CONSTANT, state_bits=bits).build(100), techniques, jax.random.key(0))


def batch(seed=0):
  tokens = np.random.default_rng(seed).integers(0, V, (B, T + 1)).astype(np.int32)
  ones = np.ones((B, T), np.int32)
  return {'inputs_BT': tokens[:, :-1], 'targets_BT': tokens[:, 1:], 'weights_BT': ones.astype(np.float32),
          'bytes_BT': ones, 'segments_BT': ones, 'positions_BT': np.tile(np.arange(T, dtype=np.int32), (B, 1))}


@functools.cache
def compiled(bits, pruned=False):
  made = learner(bits, (Prune(sparsity=0.5, start=0, end=2, every=2, where='up$'),) if pruned else ())
  return made, train.compiled_step(made)


def run(state, count, first=0, bits=8, pruned=False, of=batch):
  made, step = compiled(bits, pruned)
  if state is None: state = initial_state(made)
  losses = []
  for i in range(first, first + count):
    state, metrics = step(state, made.loss, of(i % 2))
    losses.append(float(metrics['loss']))
  return state, losses


def stored(state):
  return [node for node in jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, moments.Blocks))
          if isinstance(node, moments.Blocks)]


BETAS = [(0.9, 0.95), (0.9, 0.999), (0.0, 0.9), (0.0, 0.0), (0.9, 0.81), (0.8, 0.0), (0.99, 0.9)]


@functools.cache
def bounds(b1, b2):
  """After 1 … 300 steps."""
  return np.broadcast_to(np.asarray(moments.largest_ratio(np.arange(1., 301), b1, b2), np.float64), 300)


@settings(deadline=None, max_examples=200)
@given(st.lists(st.floats(-1e3, 1e3) | st.sampled_from([0.0, 1e-6, 1e6]), min_size=1, max_size=30), st.floats(0.5, 3),
       st.sampled_from(BETAS))
def test_no_ratio_of_exact_moments_exceeds_the_bound_and_a_growing_gradient_comes_up_to_it(gradients, growth, betas):
  """So a float32 update is never clipped."""
  b1, b2 = betas
  worst = [(b1 / b2) ** -k for k in range(30)] if b1 and b2 else [0.0, 1.0]
  for sequence in (gradients, [growth ** k for k in range(30)], worst):
    m = v = 0.0
    for count, g in enumerate(sequence, 1):
      m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
      if v == 0: continue
      ratio = abs(m) / (1 - b1 ** count) / math.sqrt(v / (1 - b2 ** count))
      assert ratio <= bounds(b1, b2)[count - 1] * (1 + 1e-5)   # which is float32
  # Gradients for which the inequality of Cauchy and Schwarz is an equality.
  if b1 and b2: assert ratio == pytest.approx(bounds(b1, b2)[29], rel=1e-5)


@pytest.mark.parametrize('b2', [0.95, 0.999])
def test_a_gradient_that_vanishes_beside_a_constant_one_moves_its_parameter_no_further(b2):
  """No update exceeds the bound of exact moments, all of them are near those of float32, and they come to an end."""
  param = nnx.Param(jnp.zeros((64, 64)), axes='DF', inputs='D')
  scale, steps = 10. ** np.random.default_rng(0).uniform(-6, 0, (64, 64)), 300
  constant = np.arange(64) % 16 == 0   # one column of every block
  def moved(adam):
    def step(state, t):
      g = jnp.where(constant, 1., jnp.where(t < 20, scale, 0)).astype(jnp.float32)
      updates, state = adam.update({'w': param.replace(g)}, state)
      return state, updates['w'].get_value()
    return np.asarray(jax.jit(lambda: jax.lax.scan(step, adam.init({'w': param}), jnp.arange(steps))[1])())
  eight, full = moved(moments.scale_by_adam8(0.9, b2, 1e-8)), moved(optax.scale_by_adam(0.9, b2, 1e-8))
  for updates in (eight, full): assert np.all(np.abs(updates).max((1, 2)) <= bounds(0.9, b2)[:steps] * (1 + 1e-4))
  vanishing = ~np.broadcast_to(constant, (64, 64))
  # What is left after twenty steps is rounded a hundred times: it adds up to twice as much in the worst of 4000 places.
  assert np.abs(eight.sum(0))[vanishing].max() < 2 * np.abs(full.sum(0))[vanishing].max()
  assert np.abs(eight[-100:, vanishing]).max() < 1e-3
  np.testing.assert_allclose(eight[:, ~vanishing].sum(0), full[:, ~vanishing].sum(0), rtol=0.02)


def test_it_learns_as_float32_does():
  (_, eight), (_, full) = run(None, 12), run(None, 12, bits=32)
  assert eight[0] == full[0] and full[-1] < 1 < full[0]
  # The first step is Adam's own: what is rounded is what is kept.
  assert eight[1] == pytest.approx(full[1], rel=1e-6)
  np.testing.assert_allclose(eight, full, atol=0.05)


@pytest.mark.parametrize('name', ['tiny', 'small'])
def test_the_state_is_a_quarter_of_that_of_float32(name):
  from efficient_lm.models import zoo
  bytes_of = {}
  for bits in (8, 32):
    optimizer = AdamW(state_bits=bits).build(100)
    abstract = jax.eval_shape(lambda: getattr(zoo, name)().build(rngs=nnx.Rngs(0)))
    bytes_of[bits] = num_bytes(jax.eval_shape(optimizer.init, nnx.state(abstract, nnx.Param)))
  assert 0.25 < bytes_of[8] / bytes_of[32] <= 0.27


def test_a_fresh_state_is_what_zeros_are_stored_as():
  param = nnx.Param(jnp.ones((2, 64, 48)), axes='DF', inputs='D')
  state = moments.scale_by_adam8(0.9, 0.95, 1e-8).init({'w': param})
  for found, dtype in ((state.mu['w'], jnp.int8), (state.nu['w'], jnp.uint8)):
    stored = moments.compress(jnp.zeros((2, 64, 48)), moments.block_shape((2, 64, 48), 'DF'), dtype)
    for got, wanted in zip(jax.tree.leaves(found), stored, strict=True):
      np.testing.assert_array_equal(got, wanted)
      assert got.dtype == wanted.dtype


def test_small_arrays_stay_float32():
  state, _ = run(None, 1)
  kept = jax.tree_util.tree_leaves_with_path(state.opt_state)
  assert all(leaf.dtype == jnp.float32 for path, leaf in kept if 'norm' in path_name(path))
  assert {leaf.dtype.name for path, leaf in kept if 'codes' in path_name(path)} == {'int8', 'uint8'}
  assert all(leaf.size >= moments.SMALL for path, leaf in kept if 'codes' in path_name(path))


def test_a_refused_step_leaves_every_bit():
  state, _ = run(None, 3)
  before = jax.device_get((state.model, state.opt_state.inner))
  state, losses = run(state, 1, of=lambda i: batch() | {'weights_BT': np.full((B, T), np.nan, np.float32)})
  assert np.isnan(losses[0]) and int(state.opt_state.skipped) == 1
  for a, b in zip(jax.tree.leaves((state.model, state.opt_state.inner)), jax.tree.leaves(before), strict=True):
    np.testing.assert_array_equal(a, b)


def test_a_pruned_weight_is_exactly_zero():
  state, losses = run(None, 4, pruned=True)
  up = np.asarray(state.model.stacks[0].blocks.mlp.up.materialize())
  assert np.mean(up == 0) == 0.5 and np.isfinite(losses).all() and stored(state.opt_state)


def test_a_resumed_run_is_the_run_bit_for_bit(tmp_path):
  state, _ = run(None, 3)
  checkpoints = Checkpoints(tmp_path)
  checkpoints.save(3, state, wait=True)
  restored = checkpoints.restore(jax.eval_shape(lambda: initial_state(compiled(8)[0])))
  checkpoints.close()
  (again, losses), (whole, wanted) = run(restored, 3, first=3), run(state, 3, first=3)
  assert losses == wanted
  for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(whole), strict=True): np.testing.assert_array_equal(a, b)


@pytest.mark.skipif('jax.device_count() != 8', reason='needs eight devices: run the tests on CPU')
@pytest.mark.parametrize('shape, axes', [
  ((2, 64, 128), 'DF'), ((4, 64, 64), 'EDF'), ((64, 4, 64), 'DNH'), ((128, 64), 'VD')])
def test_on_a_mesh_blocks_lie_where_their_parameter_does_and_nothing_moves(shape, axes):
  mesh = Mesh(data=1, fsdp=2, expert=2, tensor=2).build()
  param = nnx.Param(jnp.ones(shape), axes=axes, inputs='D')
  adam = moments.scale_by_adam8(0.9, 0.95, 1e-8)
  state = jax.eval_shape(adam.init, {'w': param})
  placed = shardings(state, mesh)
  wanted = weight_spec(axes, shape, mesh)
  assert all(leaf.spec == wanted for part in (placed.mu['w'], placed.nu['w']) for leaf in jax.tree.leaves(part))
  where = shardings({'w': param}, mesh)
  program = jax.jit(adam.update, in_shardings=(where, placed), out_shardings=(where, placed)).lower({'w': param}, state)
  text = program.compile().as_text()
  assert not any(word in text for word in ('all-gather', 'all-reduce', 'all-to-all', 'collective-permute'))


def test_it_is_optax_adam_but_for_the_rounding():
  """With moments too small to be stored in blocks it is Adam, in the last bits."""
  params = {'b': nnx.Param(jnp.linspace(-1, 1, 32).reshape(4, 8), axes='DF', inputs='D')}
  grads = jax.tree.map(lambda p: p * 0.1 + 0.03, params)
  ours, theirs = moments.scale_by_adam8(0.9, 0.95, 1e-8), optax.scale_by_adam(0.9, 0.95, 1e-8)
  states = ours.init(params), theirs.init(params)
  for _ in range(3):
    (a, first), (b, second) = ours.update(grads, states[0]), theirs.update(grads, states[1])
    states = first, second
    np.testing.assert_allclose(a['b'].get_value(), b['b'].get_value(), rtol=1e-5)


@pytest.mark.parametrize('bits', [16, 4, 0])
def test_other_widths_are_refused_in_a_line(bits):
  assert list(AdamW(state_bits=bits).check()) == [('state_bits', bits, 'must be 32 or 8')]
  assert not list(dataclasses.replace(AdamW(), state_bits=8).check())
