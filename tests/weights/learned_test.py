"""Learned grids: what trains is what is stored, gradients are the papers', and steps of any size learn alike."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from efficient_lm.formats import (
  MXFP8,
  NF4,
  AbsMax,
  Channel,
  Float8,
  FullRangeInt,
  Group,
  Int,
  MeanSquaredError,
  MidRise,
  Tensor,
  Ternary,
)
from efficient_lm.formats.ranges import Reduce
from efficient_lm.models import spec
from efficient_lm.models.moe import routing
from efficient_lm.parallel import sharding
from efficient_lm.training import transforms
from efficient_lm.tree import rewrite
from efficient_lm.weights.fake_quantized import FakeQuantized
from efficient_lm.weights.layout import Layout
from efficient_lm.weights.learned import ClippedActivation, LearnedStep, Stretched, exponent_of, power
from efficient_lm.weights.quantized import Quantized
from efficient_lm.weights.weight import Dense, Weight

N, K = 6, 16
GROUPS = Group(size=8)
LEARNED = [(LearnedStep, format) for format in (Int(), Int(bits=4), Int(bits=3, scales=GROUPS), Int(bits=2, scales=Tensor()),
                                                 MidRise(), MidRise(bits=4), Float8(), NF4(scales=GROUPS), Ternary())]
LEARNED += [(Stretched, format) for format in (MidRise(), MidRise(bits=3, scales=GROUPS), Int(bits=2), Ternary())]
name = lambda x: getattr(x, '__name__', None) or x.name
every = pytest.mark.parametrize('kind, format', LEARNED, ids=name)
some = pytest.mark.parametrize('kind, format', [LEARNED[2], LEARNED[4], LEARNED[9], LEARNED[11]], ids=name)
# Optimising these small programs takes longer than running them.
jit = functools.partial(jax.jit, compiler_options={'xla_backend_optimization_level': 0})


def draw(*shape, seed=0):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def trained(kind, format, array, letters='DF', inputs='D'):
  weight = Dense(array, letters, inputs)
  # Finer than the largest numbers ask for: some are out of reach, in every tile.
  quantizer = kind.of_weight(weight, format, None if kind is Stretched else AbsMax())
  exponent = quantizer.exponent.get_value()
  quantizer.exponent.set_value(exponent - 0.3 - 0.1 * jnp.arange(exponent.shape[-1]))
  return FakeQuantized(weight, quantizer)


@given(st.lists(st.floats(-40, 40, width=32, allow_subnormal=False), min_size=2, max_size=8))
@settings(deadline=None, max_examples=30)
def test_a_step_is_positive_grows_with_its_exponent_and_gives_it_back(exponents):
  exponents = np.sort(np.float32(exponents))
  steps = np.asarray(power(jnp.asarray(exponents)))
  assert np.all(steps > 0) and np.all(np.diff(steps) >= 0)
  assert np.all(np.abs(np.log2(steps) - exponents) < 0.0861)   # 1 + f is above 2^f by at most 6.2 %
  np.testing.assert_allclose(exponent_of(jnp.asarray(steps)), exponents, atol=2. ** -18)   # 40 in float32
  np.testing.assert_array_equal(power(jnp.floor(exponents)), 2 ** np.floor(exponents))


LAYERS_OF_EXPERTS = ('EDF', 'D', (2, 3, K, N))


@pytest.mark.thinned
@pytest.mark.parametrize('kind, format, letters, inputs, shape', [
  *((kind, format, *LAYERS_OF_EXPERTS) for kind, format in LEARNED),
  (LearnedStep, Int(bits=4), 'DF', 'D', (K, N)), (Stretched, MidRise(), 'NHD', 'NH', (2, 4, N))],
  ids=lambda x: x if isinstance(x, str) else '' if isinstance(x, tuple) else name(x))
def test_what_is_trained_is_what_is_stored_bit_for_bit(kind, format, letters, inputs, shape):
  weight = trained(kind, format, draw(*shape), letters, inputs)
  layout = Layout.of(weight)
  scales = weight.weights.scales(layout.matrix(weight.inner.materialize()), Reduce())
  rounded = jax.jit(lambda w, scales: layout.array(format.rounded(layout.matrix(w), scales)))
  expected = rounded(weight.inner.materialize(), scales)
  value = jax.jit(lambda weight: weight.materialize())
  np.testing.assert_array_equal(value(weight), expected)
  stored = jax.jit(lambda weight: weight.converted())(weight)
  assert isinstance(stored, Quantized)
  np.testing.assert_array_equal(value(stored), expected)


def gradients(quantizer, w_NK, g_NK):
  """By exponents (q, n) and by the matrix."""
  loss = lambda quantizer, w_NK: jnp.vdot(g_NK, quantizer(w_NK, Reduce()))
  by_quantizer, by_w = jit(jax.grad(loss, (0, 1)))(quantizer, w_NK)
  return np.asarray(by_quantizer.exponent.get_value()), np.asarray(by_w)


def by_hand(quantizer, w_NK, g_NK, reach, slope):
  """The same, tile by tile as the papers write it: `slope(y, number)` is the derivative by the step within reach."""
  format, exponents = quantizer.format, np.asarray(quantizer.exponent.get_value())
  q, n = exponents.shape
  by_exponent, by_w = np.zeros((q, n)), np.zeros(w_NK.shape)
  for i, j in np.ndindex(n, q):
    tile = slice(i * N // n, (i + 1) * N // n), slice(j * K // q, (j + 1) * K // q)
    step = float(power(jnp.float32(exponents[j, i])))
    y = np.float64(w_NK[tile]) / step
    number = np.float64(format.numbers(format.codes(jnp.float32(y))))
    within = np.abs(y) < reach
    by_step = np.where(within, slope(y, number), np.sign(y) * format.largest)
    # A step is 2^floor(exponent) * (1 + the rest of it).
    by_exponent[j, i] = np.sum(g_NK[tile] * by_step) * quantizer.gradient_scale * 2 ** np.floor(exponents[j, i])
    by_w[tile] = np.where(within, g_NK[tile], 0)
  return by_exponent, by_w


@every
def test_gradients_are_those_of_the_paper(kind, format):
  w_NK, g_NK = draw(N, K), draw(N, K, seed=1)
  quantizer = trained(kind, format, w_NK, 'FD').weights
  reach = format.largest + (0.5 if kind is Stretched else 0)
  assert quantizer.reach == reach
  numbers = N * K / quantizer.exponent.get_value().size
  assert quantizer.gradient_scale == pytest.approx((numbers * format.largest) ** -0.5)
  got, wanted = gradients(quantizer, w_NK, g_NK), by_hand(quantizer, w_NK, g_NK, reach, lambda y, number: number - y)
  for a, b in zip(got, wanted, strict=True): np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
  assert 0 < np.mean(got[1] == 0) < 0.8, 'some are out of reach, some within'


def test_only_clipped_activations_move_the_limit_of_pact():
  x, g, format = draw(2, N, K), draw(2, N, K, seed=1), Int(bits=4, scales=Tensor())
  quantizer = ClippedActivation.of_tokens(Dense(draw(K, N), 'DF', 'D'), format)
  quantizer.exponent.set_value(exponent_of(jnp.full((1, 1), 0.9 / format.largest)))
  loss = lambda quantizer: jnp.vdot(g, quantizer(x, Reduce()))
  by_exponent = jit(jax.grad(loss))(quantizer).exponent.get_value()
  limit = float(power(quantizer.exponent.get_value()[0, 0])) * format.largest
  by_limit = np.sum(np.where(np.abs(x) >= limit, np.sign(x) * g, 0))   # eq. 3, for either sign
  by_step = by_limit * format.largest
  np.testing.assert_allclose(by_exponent, by_step * 2 ** np.floor(quantizer.exponent.get_value()), rtol=1e-4)
  assert np.all(np.abs(quantizer(x, Reduce())) <= limit * 1.0001)


@some
def test_scaling_weights_and_step_together_scales_what_they_round_to(kind, format):
  """Rounding jumps, but this direction is smooth, and in it finite differences are gradients: rounded = w . dw + s . ds."""
  w_NK, g_NK = draw(N, K), draw(N, K, seed=1)
  quantizer = trained(kind, format, w_NK, 'FD').weights
  quantizer.gradient_scale = 1.
  by_exponent, by_w = gradients(quantizer, w_NK, g_NK)
  exponent = quantizer.exponent.get_value()
  step_times_slope = by_exponent * np.asarray(power(exponent) / 2 ** jnp.floor(exponent))
  rounded = lambda factor: jnp.vdot(g_NK, format.rounded(w_NK * factor, quantizer.scales(w_NK, Reduce())._replace(
    scale=power(exponent) * factor)))
  # A factor of 2 is exact, so the difference is that of any size.
  np.testing.assert_allclose(np.vdot(w_NK, by_w) + step_times_slope.sum(), rounded(2) - rounded(1), rtol=1e-4, atol=1e-4)


@some
def test_within_reach_no_number_moves_by_more_than_half_a_step(kind, format):
  w_NK = draw(N, K)
  quantizer = trained(kind, format, w_NK, 'FD').weights
  scales = quantizer.scales(w_NK, Reduce())
  step = format.steps(scales)[0].repeat(N // scales.scale.shape[-1], 0).repeat(K // scales.scale.shape[-2], 1)
  moved = np.abs(quantizer(w_NK, Reduce()) - w_NK) / step
  assert np.all(moved[np.abs(w_NK) < quantizer.reach * step] <= 0.5001)


def test_the_first_stretched_grid_reaches_every_number_and_cuts_evenly():
  w_NK = draw(N, K)
  for format, levels in ((MidRise(), [-.75, -.25, .25, .75]), (Int(bits=2), [-2 / 3, 0, 2 / 3])):
    quantizer = Stretched.of_weight(Dense(w_NK, 'FD', 'D'), format)
    limit = np.abs(w_NK).max(1, keepdims=True)
    relative = np.asarray(quantizer(w_NK, Reduce())) / limit
    assert np.abs(relative[..., None] - np.array(levels)).min(-1).max() < 1e-6
    cells = np.clip(np.floor((np.asarray(w_NK) / limit + 1) / 2 * len(levels)), 0, len(levels) - 1).astype(int)
    np.testing.assert_allclose(relative, np.array(levels)[cells], atol=1e-6)
    _, by_w = gradients(quantizer, w_NK * 0.999, jnp.ones((N, K)))
    np.testing.assert_array_equal(by_w, 1)


@pytest.mark.parametrize('range, expected', [
  (None, lambda w: 2 * np.abs(w).mean(1) / 7 ** 0.5), (AbsMax(), lambda w: np.abs(w).max(1) / 7)], ids=['paper', 'absmax'])
def test_a_first_step_is_fitted_as_asked(range, expected):
  w_NK = draw(N, K)
  quantizer = LearnedStep.of_weight(Dense(w_NK, 'FD', 'D'), Int(bits=4), range)
  np.testing.assert_allclose(power(quantizer.exponent.get_value())[0], expected(w_NK), rtol=1e-6)


def test_weights_that_start_at_zero_can_leave_it():
  quantizer = LearnedStep.of_weight(Dense(jnp.zeros((N, K)), 'FD', 'D'), Int(bits=4))
  w_NK = jnp.full((N, K), 0.5 * K ** -0.5)
  _, by_w = gradients(quantizer, w_NK, jnp.ones((N, K)))
  np.testing.assert_array_equal(by_w, 1)
  np.testing.assert_allclose(quantizer(w_NK, Reduce()), w_NK, rtol=0.2)


# Steps of the uniform grids of least squared error for a normal distribution of deviation 1 (Max 1960, table II).
@pytest.mark.parametrize('bits, step', [(2, .9957), (3, .5860), (4, .3352)])
@pytest.mark.parametrize('kind', [LearnedStep, ClippedActivation])
def test_the_first_step_of_activations_is_the_best_for_a_normal_distribution(kind, bits, step):
  quantizer = kind.of_tokens(Dense(draw(5, 3, K, N), 'EDF', 'D'), MidRise(bits=bits, scales=Tensor()))
  assert quantizer.exponent.get_value().shape == (5, 1, 1), 'one a layer, for all experts and tokens'
  np.testing.assert_allclose(power(quantizer.exponent.get_value()), step, rtol=0.03)   # 64 candidates, and 4096 quantiles


def test_all_tokens_share_a_step_and_each_says_where_it_should_go():
  x, letters = draw(2, 3, K), 'BTD'
  weight = Dense(draw(K, N), 'DF', 'D')
  quantizer = LearnedStep.of_tokens(weight, Int(bits=4, scales=Tensor()))
  of = jit(lambda x: FakeQuantized(weight, None, quantizer).prepare_input(x, letters))
  np.testing.assert_array_equal(of(x)[:1], of(x[:1]))
  g = draw(*x.shape, seed=1)
  loss = lambda quantizer, x, g: jnp.vdot(g, FakeQuantized(weight, None, quantizer).prepare_input(x, letters))
  slope = jit(lambda x, g: jax.grad(loss)(quantizer, x, g))
  total = slope(x, g).exponent.get_value()
  parts = [slope(x[i:i + 1], g[i:i + 1]).exponent.get_value() for i in range(len(x))]
  np.testing.assert_allclose(total, sum(parts), rtol=1e-4)
  assert total.shape == (1, 1)


def test_layers_learn_as_each_would_alone():
  """Stacked, and run by a scan."""
  weights = trained(LearnedStep, Int(bits=3), draw(4, K, K) * jnp.arange(1, 5)[:, None, None])
  tokens = LearnedStep.of_tokens(weights, Int(bits=4, scales=Tensor()))
  weights = FakeQuantized(weights.inner, weights.weights, tokens)
  assert weights.weights.exponent.get_value().shape == (4, 1, K)
  assert weights.activations.exponent.get_value().shape == (4, 1, 1)
  x, g = draw(2, 3, K), draw(2, 3, K, seed=1)
  layer = lambda x, weight: jnp.tanh(weight.contract('BTD,DF->BTF', x))

  def scanned(weights): return jnp.vdot(g, jax.lax.scan(lambda x, weight: (layer(x, weight), None), x, weights)[0])

  def unrolled(weights):
    return jnp.vdot(g, functools.reduce(layer, [jax.tree.map(lambda a, i=i: a[i], weights) for i in range(4)], x))
  ours, alone = (jax.tree.leaves(jit(jax.grad(loss))(weights)) for loss in (scanned, unrolled))
  for a, b in zip(ours, alone, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * np.abs(b).max())   # the same sums in another program


def test_copies_of_a_matrix_share_its_steps():
  """As the experts of an upcycled layer do."""
  one = trained(LearnedStep, Int(bits=4), draw(K, N))
  copies = FakeQuantized(Dense(jnp.stack([one.inner.materialize()] * 3), 'EDF', 'D'), one.weights)
  np.testing.assert_array_equal(copies.materialize(), jnp.stack([one.materialize()] * 3))
  np.testing.assert_array_equal(copies.converted().materialize(), copies.materialize())


def test_exponents_are_no_matrices_to_the_optimizer():
  weight = trained(LearnedStep, Int(bits=4, scales=GROUPS), draw(2, 3, K, N), 'EDF')
  params = nnx.state(weight, nnx.Param)
  decays, orthogonal = transforms.matrices(params), transforms.orthogonalized(params)
  assert jax.tree.leaves(decays['inner']) == [True] and jax.tree.leaves(decays['weights']) == [False]
  assert jax.tree.leaves(orthogonal['weights']) == [] != jax.tree.leaves(orthogonal['inner'])


@pytest.mark.parametrize('kind, format', [(LearnedStep, Int(bits=3)), (Stretched, MidRise())], ids=['lsq 3', 'seq 2'])
def test_steps_of_any_size_learn_alike_and_from_either_side(kind, format):
  """Rows that differ by seven powers of ten, one learning rate: each finds its step from nearly three times too coarse, and
  from nearly three times too fine."""
  size_N1 = jnp.array([1e-4, 1., 1e3])[:, None]
  w_NK = draw(1, 256) * size_N1
  adam = optax.adam(0.05)

  def step(carry, _):
    quantizer, state = carry
    error = lambda quantizer: jnp.sum(jnp.square((quantizer(w_NK, Reduce()) - w_NK) / size_N1))
    updates, state = adam.update(jax.grad(error)(quantizer), state)
    return (optax.apply_updates(quantizer, updates), state), error(quantizer)
  learn = jax.jit(lambda quantizer: jax.lax.scan(step, (quantizer, adam.init(quantizer)), length=150))
  found = []
  for factor in (1.5, -1.5):
    quantizer = kind.of_weight(Dense(w_NK, 'FD', 'D'), format, MeanSquaredError())
    quantizer.exponent.set_value(quantizer.exponent.get_value() + factor)
    (learned, _), errors = learn(quantizer)
    assert errors[-1] < 0.6 * errors[0]
    found.append(power(learned.exponent.get_value()) / size_N1[:, 0])
  np.testing.assert_allclose(found, np.mean(found), rtol=0.05)   # Adam swings by about its rate around the end


@pytest.mark.parametrize('make, message', [
  (lambda weight: LearnedStep.of_weight(weight, MXFP8()), 'MXFP8 per group of 32: only a grid around 0'),
  (lambda weight: LearnedStep.of_weight(weight, Int(symmetric=False)), 'int8 with zero point per channel: only a grid'),
  (lambda weight: LearnedStep.of_weight(weight, FullRangeInt()), 'full-range int4 per channel: only a grid around 0'),
  (lambda weight: Stretched.of_weight(weight, NF4()), 'NF4 per group of 64: .* equal steps can be stretched: choose Mid'),
  (lambda weight: LearnedStep.of_tokens(weight, Int()), r'int8 per channel: .* scales=Tensor\(\), one step for all')],
  ids=['power of two', 'zero point', 'a step of either sign', 'unequal steps', 'a step a token'])
def test_what_cannot_be_learned_is_refused(make, message):
  with pytest.raises(ValueError, match=message): make(Dense(draw(64, N), 'DF', 'D'))


def learning(moe):
  """Experts with channels whose inputs a mesh cuts ('down'), and whose outputs it cuts ('gate', 'up')."""
  def of(path, weight):
    tokens = LearnedStep.of_tokens(weight, Int(scales=Tensor()))
    format = Int(bits=3, scales=Tensor() if 'up' in path else Channel())
    return FakeQuantized(weight, LearnedStep.of_weight(weight, format), tokens)
  return rewrite(moe, Weight, of, 'experts')


def test_steps_that_devices_share_get_the_gradients_of_all(mesh):
  site = spec.Site(dim=16, depth=2, norm_eps=1e-6)
  dispatch = routing.Dispatch(transport='gather')
  moe = learning(spec.MoE(num_experts=8, hidden=32, dispatch=dispatch).build(site, rngs=nnx.Rngs(params=0)))
  x_BTD, g_BTD = draw(8, 8, 16), draw(8, 8, 16, seed=1)
  of = lambda call: jit(jax.grad(lambda moe, x_BTD: jnp.vdot(g_BTD, call(moe, x_BTD))))
  wanted = of(lambda moe, x_BTD: moe.oracle(x_BTD))(moe, x_BTD)
  with mesh(1, 2, 2, 2):
    placed = jax.device_put(moe, sharding.shardings(moe, jax.sharding.get_mesh()))
    ours = of(lambda moe, x_BTD: moe(x_BTD)[0])(placed, x_BTD)
  assert np.abs(wanted.experts.down.weights.exponent.get_value()).min() > 0
  for a, b in zip(jax.tree.leaves(jax.device_get(ours)), jax.tree.leaves(wanted), strict=True):
    # A token near the border of two levels may fall on either side, by the order of the sums before it.
    np.testing.assert_allclose(a, b, atol=2e-3 * np.abs(b).max())


def test_steps_of_half_precision_are_learned_as_floats_and_used_as_halves():
  """What is trained with is what is stored, bit for bit, and the gradient is that of the step before it is rounded."""
  w = Dense(draw(32, 16), 'DF', 'D')
  half, full = (LearnedStep.of_weight(w, Int(bits=4, scale_dtype=dtype)) for dtype in ('float16', 'float32'))
  matrix_OI = w.materialize().T
  scales = half.scales(matrix_OI, Reduce())
  assert scales.scale.dtype == jnp.float16 and half.exponent.get_value().dtype == jnp.float32
  np.testing.assert_array_equal(half(matrix_OI, Reduce()), half.format.decode(half.format.encode(matrix_OI, scales)))
  full.exponent = half.exponent
  slope = lambda quantizer: jax.grad(lambda one: one(matrix_OI, Reduce()).sum())(quantizer).exponent.get_value()
  # The steps that were fitted are halves up to the rounding of an exponent, 2^-23 of 16: gradients are sums of 32 numbers.
  np.testing.assert_allclose(slope(half), slope(full), rtol=1e-4, atol=1e-5)
