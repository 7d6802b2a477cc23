"""Rounding errs by half a step at most, and the fused forms equal their stages one after another."""
import importlib

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies
from jax.experimental.pallas import tpu as pltpu

from efficient_lm.ops.packing import unpack_halves
from efficient_lm.ops.quantize import pallas_gpu, pallas_tpu, quantize, quantize_cache, quantize_tiles
from efficient_lm.ops.quantize.cases import CASES, Case, bench
from efficient_lm.ops.quantize.tiles import GpuTiles, TpuTiles, factors_for
from efficient_lm.ops.rms_norm import rms_norm


def agree(got, wanted, tolerance):
  """Scales are equal up to rounding, values up to one step where y lies halfway between two, and nearly all are equal."""
  (values, scale), (wanted_values, wanted_scale) = got, wanted
  assert values.dtype == wanted_values.dtype and scale.dtype == jnp.float32
  np.testing.assert_allclose(scale, wanted_scale, rtol=1e-5)
  values, wanted_values = np.asarray(values, np.float32), np.asarray(wanted_values, np.float32)
  np.testing.assert_allclose(values, wanted_values, rtol=0, atol=tolerance * np.abs(wanted_values).max())
  assert np.mean(values != wanted_values) < 0.01


@pytest.mark.thinned
@pytest.mark.parametrize('name', CASES)
def test_equals_the_reference(name):
  case = CASES[name]
  arguments = case.arguments()
  agree(jax.jit(case.call('xla'))(*arguments), case.call('reference')(*arguments), case.tolerance)


@pytest.mark.parametrize('implementation', ['reference', 'xla'])
@hypothesis.given(strategies.sampled_from([(1, 1), (5, 70)]), strategies.integers(-20, 20), strategies.integers(0, 2 ** 30))
@hypothesis.settings(max_examples=15, deadline=None)
def test_rounding_errs_by_half_a_step_at_most(implementation, shape, size, seed):
  x = jnp.asarray(np.random.default_rng(seed).normal(size=shape) ** 3 * 10. ** size, jnp.float32)
  values, scale = quantize(x, implementation=implementation)
  # The product that undoes the scale rounds too: 127 * 2^-23 of a step.
  assert (jnp.abs(values * scale[:, None] - x) <= scale[:, None] * (0.5 + 127 * 2 ** -22)).all()
  assert (jnp.abs(values).max(axis=1) == 127).all()
  values, scale = quantize(x, dtype=jnp.float8_e4m3fn, implementation=implementation)
  half_step = jnp.maximum(jnp.abs(x) / 16, scale[:, None] / 1024)
  assert (jnp.abs(values.astype(jnp.float32) * scale[:, None] - x) <= half_step * (1 + 2 ** -20)).all()


@pytest.mark.parametrize('dtype', [jnp.int8, jnp.float8_e4m3fn])
@pytest.mark.parametrize('implementation', ['reference', 'xla'])
def test_a_row_of_zeros_is_zero_with_a_finite_scale(implementation, dtype):
  x = jnp.zeros((3, 32)).at[1, 4].set(5.)
  for options in ({}, {'norm_I': jnp.ones(32)}, {'block': 16}):
    values, scale = quantize(x, dtype=dtype, **options, implementation=implementation)
    assert np.isfinite(scale).all() and (scale > 0).all()
    assert not values[::2].astype(jnp.float32).any() and values[1].astype(jnp.float32).any()


def test_the_normalised_form_is_the_norm_then_the_rounding():
  x, norm = jax.random.normal(jax.random.key(0), (6, 48)), jnp.linspace(-1, 2, 48)
  agree(quantize(x, norm_I=norm, eps=0.1), quantize(rms_norm(x, norm, 0.1)), 1 / 127)


def test_a_rotation_spreads_an_outlier():
  """One number of 100 among units: the step of its row shrinks by about sqrt(64), and so does the error of the others."""
  x = jax.random.normal(jax.random.key(0), (8, 64)).at[:, 5].set(100.)
  assert (quantize(x, block=64)[1] < quantize(x)[1] / 5).all()


@pytest.mark.parametrize(('bits', 'group'), [(8, 1), (4, 1), (8, 3)])
def test_a_cache_errs_by_half_a_step_of_its_head_and_group(bits, group):
  x = jax.random.normal(jax.random.key(0), (2, 3, 12, 8)).at[0, 0, 0].set(0)
  values, scale = quantize_cache(x, bits=bits, group=group)
  assert values.shape == (2, 3, 12, 8 * bits // 8) and scale.shape == (2, 3, 12 // group)
  if bits == 4: values = unpack_halves(values)
  per_token = jnp.repeat(scale, group, axis=-1)[..., None]
  assert (jnp.abs(values * per_token - x) <= per_token * (0.5 + 1e-5)).all() and np.isfinite(scale).all()
  largest = jnp.abs(values.reshape(2, 3, 12 // group, -1)).max(-1)
  assert (jnp.where(scale > 1e-20, largest, 2 ** (bits - 1) - 1) == 2 ** (bits - 1) - 1).all()


@pytest.mark.parametrize(('bits', 'group', 'part'), [(8, 3, 4), (4, 4, 1), (4, 1, 4)])
def test_tiles_of_a_cache_err_by_half_a_step_each(bits, group, part):
  """Half a step, and what float16 adds to the tile's largest number; constant tiles and zeros included."""
  x = jax.random.normal(jax.random.key(0), (2, 3, 12, 8)).at[0, 0].set(0).at[0, 1].set(-300).at[1, 0].multiply(1e-3)
  values, scale, shift = quantize_tiles(x, bits=bits, group=group, part=part)
  assert values.shape == (2, 3, 12, 8 * bits // 8) and scale.shape == shift.shape == (2, 3, 12 // group, 8 // part)
  values = unpack_halves(values) if bits == 4 else values
  tiles = lambda y: y.reshape(2, 3, 12 // group, group, 8 // part, part)
  each = lambda y: y.astype(jnp.float32)[:, :, :, None, :, None]
  error = jnp.abs(tiles(values) * each(scale) + each(shift) - tiles(x))
  largest = jnp.max(jnp.abs(tiles(x)), (-3, -1), keepdims=True)
  assert (error <= each(scale) * 0.5 + largest * 2. ** -10 + 2. ** -24).all()
  assert values.min() == -2 ** (bits - 1) and values.max() == 2 ** (bits - 1) - 1, 'all levels are used'


def test_what_float16_cannot_hold_stays_finite():
  values, scale, shift = quantize_tiles(jnp.array([[[[1e9, -1e9], [3e38, 0.]]]]), bits=8, group=2, part=1)
  assert all(np.isfinite(np.asarray(x, np.float32)).all() for x in (values, scale, shift))


@pytest.mark.parametrize('options', [dict(group=5, part=1), dict(group=1, part=8), dict(bits=3, group=1, part=1)], ids=str)
def test_tiles_that_do_not_divide_are_refused(options):
  with pytest.raises(ValueError, match=r'must divide|choose 4 or 8'): quantize_tiles(jnp.ones((1, 1, 4, 8)), **options)


@pytest.mark.parametrize(('options', 'message'), [
  ({'dtype': jnp.int16}, 'choose int8'), ({'block': 12}, 'power of two'), ({'block': 64}, 'divides 32 numbers')])
def test_what_cannot_be_is_refused(options, message):
  with pytest.raises(ValueError, match=message): quantize(jnp.ones((2, 32)), **options)


@pytest.mark.parametrize('platform', ['cpu', 'gpu', 'tpu'])
def test_benches_can_be_evaluated_abstractly(platform):
  for case in bench(platform).values():
    arguments = jax.eval_shape(case.arguments)
    values, scale = jax.eval_shape(case.call('xla'), *arguments)
    assert values.shape == arguments[0].shape and scale.shape == values.shape[:1]
    assert case.flops > 0 and case.bytes > 0


@pytest.mark.thinned
@pytest.mark.parametrize('case', [
  Case(40, 256, norm=True), Case(5, 256, norm=True, block=16), Case(33, 256, block=256, dtype=jnp.bfloat16),
  Case(8, 128, values=jnp.float8_e4m3fn)], ids=str)
def test_the_tpu_kernel_equals_the_reference(case):
  arguments = case.arguments()
  assert not pallas_tpu.refuses(arguments[0], block=case.block)
  with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True, uninitialized_memory='nan')):
    got = jax.block_until_ready(case.call('pallas_tpu', TpuTiles(32))(*arguments))
    assert not importlib.import_module('jax._src.pallas.mosaic.interpret.interpret_pallas_call').races.races_found
  agree(got, case.call('reference')(*arguments), case.tolerance)


def test_the_tpu_kernel_refuses_what_it_cannot_do():
  assert 'multiple of 128' in pallas_tpu.refuses(jnp.ones((2, 96)))
  assert 'at most 1024' in pallas_tpu.refuses(jnp.ones((2, 2048)), block=2048)
  assert 'do not fit' in pallas_tpu.refuses(jax.ShapeDtypeStruct((2, 65536), jnp.float32))


def test_the_gpu_kernel_refuses_what_it_cannot_do():
  if jax.__version_info__ < (0, 11): pytest.skip('refuses everything before jax 0.11')
  assert 'multiple of 512' in pallas_gpu.refuses(jnp.ones((2, 768)))
  assert 'no passes' in pallas_gpu.refuses(jnp.ones((2, 2048)), block=16)
  assert 'no passes' in pallas_gpu.refuses(jnp.ones((2, 5120)), block=64)
  assert 'does not fit' in pallas_gpu.refuses(jax.ShapeDtypeStruct((2, 16384), jnp.float32), block=64)


@pytest.mark.parametrize(('I', 'block', 'itemsize'), [(4096, 128, 2), (14336, 512, 2), (8192, 4096, 4), (2048, 32, 2)])
def test_the_passes_of_a_rotation_multiply_to_it(I, block, itemsize):
  factors = factors_for(I, block, itemsize)
  assert np.prod(factors) == block and len(factors) < 4 and all(I // f % 128 == 0 for f in factors)


@pytest.mark.parametrize('case', [
  Case(5, 512, norm=True), Case(3, 1024, dtype=jnp.bfloat16), Case(5, 2048, block=64, dtype=jnp.bfloat16),
  Case(4, 2048, norm=True, block=512), Case(3, 4096, norm=True, block=256, dtype=jnp.bfloat16),
  Case(3, 2048, block=32, values=jnp.float8_e4m3fn, dtype=jnp.bfloat16)], ids=str)
def test_the_gpu_kernel_equals_the_reference(case):
  from jax.experimental.pallas import mosaic_gpu as plgpu
  if not hasattr(plgpu, 'InterpretGPUParams'): pytest.skip('jax interprets GPU kernels from 0.11 on')
  arguments = case.arguments()
  assert not pallas_gpu.refuses(arguments[0], block=case.block)
  with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
    got = jax.block_until_ready(case.call('pallas_gpu', GpuTiles(3, 2))(*arguments))
  assert not importlib.import_module('jax._src.pallas.mosaic_gpu.interpret.interpret_pallas_call').get_races().races_found
  agree(got, case.call('reference')(*arguments), case.tolerance)
