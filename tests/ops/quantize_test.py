"""Rounding errs by half a step at most, and the fused forms are their parts."""
import importlib

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies
from jax.experimental.pallas import tpu as pltpu

from efficient_lm.ops.quantize import pallas_gpu, pallas_tpu, quantize, quantize_cache
from efficient_lm.ops.quantize.cases import CASES, Case, bench
from efficient_lm.ops.quantize.grid import hadamard_matrix, pack_halves, unpack_halves
from efficient_lm.ops.quantize.tiles import GpuTiles, TpuTiles, factors_for
from efficient_lm.ops.quantize.xla import rotate
from efficient_lm.ops.rms_norm import rms_norm


def agree(got, wanted, tolerance):
  """Scales to rounding, and values to one step where y fell between two; most of them are equal."""
  (values, scale), (wanted_values, wanted_scale) = got, wanted
  assert values.dtype == wanted_values.dtype and scale.dtype == jnp.float32
  np.testing.assert_allclose(scale, wanted_scale, rtol=1e-5)
  values, wanted_values = np.asarray(values, np.float32), np.asarray(wanted_values, np.float32)
  np.testing.assert_allclose(values, wanted_values, rtol=0, atol=tolerance * np.abs(wanted_values).max())
  assert np.mean(values != wanted_values) < 0.01


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
  for options in ({}, {'norm_D': jnp.ones(32)}, {'hadamard': 16}):
    values, scale = quantize(x, dtype=dtype, **options, implementation=implementation)
    assert np.isfinite(scale).all() and (scale > 0).all()
    assert not values[::2].astype(jnp.float32).any() and values[1].astype(jnp.float32).any()


def test_the_normalised_form_is_the_norm_then_the_rounding():
  x, norm = jax.random.normal(jax.random.key(0), (6, 48)), jnp.linspace(-1, 2, 48)
  agree(quantize(x, norm_D=norm, eps=0.1), quantize(rms_norm(x, norm, 0.1)), 1 / 127)


@pytest.mark.parametrize('size', [2, 16, 64, 128, 512])
def test_a_rotation_is_orthonormal_and_undoes_itself(size):
  x = jax.random.normal(jax.random.key(0), (3, 2 * size))
  np.testing.assert_allclose(rotate(rotate(x, size), size), x, atol=1e-5)
  np.testing.assert_allclose(jnp.linalg.norm(rotate(x, size), axis=1), jnp.linalg.norm(x, axis=1), rtol=1e-5)
  np.testing.assert_array_equal(hadamard_matrix(size) @ hadamard_matrix(size), size * np.eye(size))


def test_a_rotation_spreads_an_outlier():
  """One number of 100 among units: its row's step shrinks by about sqrt(64), and with it the error of all the others."""
  x = jax.random.normal(jax.random.key(0), (8, 64)).at[:, 5].set(100.)
  assert (quantize(x, hadamard=64)[1] < quantize(x)[1] / 5).all()


def test_packing_is_undone():
  values = jnp.stack(jnp.meshgrid(jnp.arange(-8, 8), jnp.arange(-8, 8)), -1).astype(jnp.int8)   # every pair there is
  np.testing.assert_array_equal(unpack_halves(pack_halves(values)), values)


def test_the_first_half_is_in_the_low_bits():
  assert pack_halves(jnp.array([1, 2, -1, 3], jnp.int8)).tolist() == [0xf1, 0x32]


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


@pytest.mark.parametrize(('options', 'message'), [
  ({'dtype': jnp.int16}, 'choose int8'), ({'hadamard': 12}, 'power of two'), ({'hadamard': 64}, 'divides D = 32')])
def test_what_cannot_be_is_refused(options, message):
  with pytest.raises(ValueError, match=message): quantize(jnp.ones((2, 32)), **options)


@pytest.mark.parametrize('platform', ['cpu', 'gpu', 'tpu'])
def test_benches_can_be_evaluated_abstractly(platform):
  for case in bench(platform).values():
    arguments = jax.eval_shape(case.arguments)
    values, scale = jax.eval_shape(case.call('xla'), *arguments)
    assert values.shape == arguments[0].shape and scale.shape == values.shape[:1]
    assert case.flops > 0 and case.bytes > 0


@pytest.mark.parametrize('case', [
  Case(40, 256, norm=True), Case(5, 256, norm=True, hadamard=16), Case(33, 256, hadamard=256, dtype=jnp.bfloat16),
  Case(8, 128, values=jnp.float8_e4m3fn)], ids=str)
def test_the_tpu_kernel_equals_the_reference(case):
  arguments = case.arguments()
  assert not pallas_tpu.refuses(arguments[0], hadamard=case.hadamard)
  with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True, uninitialized_memory='nan')):
    got = jax.block_until_ready(case.call('pallas_tpu', TpuTiles(32))(*arguments))
    assert not importlib.import_module('jax._src.pallas.mosaic.interpret.interpret_pallas_call').races.races_found
  agree(got, case.call('reference')(*arguments), case.tolerance)


def test_the_tpu_kernel_refuses_what_it_cannot_do():
  assert 'multiple of 128' in pallas_tpu.refuses(jnp.ones((2, 96)))
  assert 'at most 1024' in pallas_tpu.refuses(jnp.ones((2, 2048)), hadamard=2048)
  assert 'do not fit' in pallas_tpu.refuses(jax.ShapeDtypeStruct((2, 65536), jnp.float32))


def test_the_gpu_kernel_refuses_what_it_cannot_do():
  if jax.__version_info__ < (0, 11): pytest.skip('refuses everything before jax 0.11')
  assert 'multiple of 512' in pallas_gpu.refuses(jnp.ones((2, 768)))
  assert 'no passes' in pallas_gpu.refuses(jnp.ones((2, 2048)), hadamard=16)
  assert 'no passes' in pallas_gpu.refuses(jnp.ones((2, 5120)), hadamard=64)
  assert 'does not fit' in pallas_gpu.refuses(jax.ShapeDtypeStruct((2, 16384), jnp.float32), hadamard=64)


@pytest.mark.parametrize(('D', 'hadamard', 'itemsize'), [(4096, 128, 2), (14336, 512, 2), (8192, 4096, 4), (2048, 32, 2)])
def test_the_passes_of_a_rotation_multiply_to_it(D, hadamard, itemsize):
  factors = factors_for(D, hadamard, itemsize)
  assert np.prod(factors) == hadamard and len(factors) < 4 and all(D // f % 128 == 0 for f in factors)


@pytest.mark.parametrize('case', [
  Case(5, 512, norm=True), Case(3, 1024, dtype=jnp.bfloat16), Case(5, 2048, hadamard=64, dtype=jnp.bfloat16),
  Case(4, 2048, norm=True, hadamard=512), Case(3, 4096, norm=True, hadamard=256, dtype=jnp.bfloat16),
  Case(3, 2048, hadamard=32, values=jnp.float8_e4m3fn, dtype=jnp.bfloat16)], ids=str)
def test_the_gpu_kernel_equals_the_reference(case):
  from jax.experimental.pallas import mosaic_gpu as plgpu
  if not hasattr(plgpu, 'InterpretGPUParams'): pytest.skip('jax interprets GPU kernels from 0.11 on')
  arguments = case.arguments()
  assert not pallas_gpu.refuses(arguments[0], hadamard=case.hadamard)
  with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
    got = jax.block_until_ready(case.call('pallas_gpu', GpuTiles(3, 2))(*arguments))
  assert not importlib.import_module('jax._src.pallas.mosaic_gpu.interpret.interpret_pallas_call').get_races().races_found
  agree(got, case.call('reference')(*arguments), case.tolerance)
