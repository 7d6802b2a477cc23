"""Rounding errs by at most half a step, and every product is that of the dequantized matrix."""
import dataclasses
import importlib

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies

from efficient_lm.ops.packing import pack, unpack
from efficient_lm.ops.quantized_matmul import (
  IMPLEMENTATIONS,
  QuantizedMatrix,
  dequantize,
  quantize,
  quantize_rows,
  quantized_matmul,
)
from efficient_lm.ops.quantized_matmul import tiles as sizes
from efficient_lm.ops.quantized_matmul.cases import CASES, F8, W2A8, W4A8, W4A16, W8A8, W8A16, Case, Scheme, bench
from efficient_lm.ops.quantized_matmul.tiles import FewTiles, GpuTiles, TpuTiles

pytestmark = pytest.mark.usefixtures('quick_unless_long')


def close(got, wanted, tolerance: float):
  assert got.dtype == wanted.dtype
  got, wanted = np.asarray(got, np.float32), np.asarray(wanted, np.float32)
  np.testing.assert_allclose(got, wanted, rtol=0, atol=tolerance * np.abs(wanted).max())


@pytest.mark.thinned
@pytest.mark.parametrize('name', CASES)
def test_equals_the_reference(name):
  case = CASES[name]
  arguments = jax.jit(case.arguments)()
  close(jax.jit(case.call('auto'))(*arguments), jax.jit(case.expected)(*arguments), case.tolerance)


@pytest.mark.parametrize('name', ['W8A8', 'float8', 'W4A16'])
def test_baselines_compute_the_same(name):
  case = CASES[name]
  x_MI, *arrays = case.arguments()
  wanted = case.expected(x_MI, *arrays)
  # The first baseline does not round x, so that it differs by the error of rounding x: half a step of 127, or 1/16 (float8).
  rough = {None: 1e-5, 'int8': 1 / 127, 'float8_e4m3fn': 1 / 16}[case.scheme.activations]
  for baseline in case.baselines().values():
    close(baseline(x_MI, *arrays), wanted, rough)
  operands, product = case.unquantized()
  close(product(*operands), wanted, rough)


@pytest.mark.parametrize('platform', ['cpu', 'gpu', 'tpu'])
def test_benchmark_cases_can_be_traced(platform):
  for case in bench(platform).values():
    arguments = jax.eval_shape(case.arguments)
    y = jax.eval_shape(case.call('auto'), *arguments)
    assert y.shape == (case.rows, case.inputs if case.of == 'dgrad' else case.outputs) and y.dtype == case.dtype
    assert case.bytes > case.inputs * case.outputs * case.scheme.bits / 8


@hypothesis.given(strategies.integers(0, 999), strategies.sampled_from([8, 4, 2]), strategies.sampled_from([8, 16, 48]),
                  strategies.booleans(), strategies.sampled_from([1e-6, 1., 1e6]))
@hypothesis.settings(max_examples=10, deadline=None)
def test_rounding_errs_by_at_most_half_a_step(seed, bits, group, symmetric, size):
  w_OI = size * jax.random.normal(jax.random.key(seed), (5, 48)) + (0 if symmetric else 3 * size)
  q = quantize(w_OI, bits, group, symmetric=symmetric)
  half_OI = np.repeat(np.asarray(q.scale_QO.T), group, axis=1) / 2
  # Beyond half a step there are only a few float32 roundings of numbers of the size of w.
  assert (np.abs(dequantize(q) - w_OI) <= half_OI * 1.0001 + 1e-6 * np.abs(w_OI).max()).all()
  assert (q.shape, q.group) == ((5, 48), group)


def test_float8_errs_by_at_most_a_sixteenth():
  w_OI = jax.random.normal(jax.random.key(0), (16, 64))
  q = quantize(w_OI, dtype=jnp.float8_e4m3fn)
  # 3 bits after the leading one; numbers below 2^-6 of the grid have a fixed step of 2^-9.
  allowed = np.maximum(np.abs(w_OI) / 16, np.asarray(q.scale_QO.T) * 2 ** -10)
  assert (np.abs(dequantize(q) - w_OI) <= allowed * 1.0001).all()


def test_zeros_and_equal_numbers_stay_what_they_are():
  for symmetric in (True, False):
    assert not dequantize(quantize(jnp.zeros((2, 8)), 4, symmetric=symmetric)).any()
    np.testing.assert_allclose(dequantize(quantize(jnp.full((2, 8), -7.), 4, symmetric=symmetric)), -7., rtol=1e-4)
  for dtype in (jnp.int8, jnp.float8_e4m3fn):
    q_MI, scale_M1 = quantize_rows(jnp.zeros((2, 8)), dtype)
    assert np.isfinite(scale_M1).all() and not (q_MI.astype(jnp.float32) * scale_M1).any()


def test_two_bits_symmetric_is_ternary_and_a_half_zero_point_gives_four_levels():
  w = quantize(jax.random.normal(jax.random.key(0), (4, 64)), 2)
  assert set(np.unique(unpack(w.values, 2))) == {-1, 0, 1}
  four = QuantizedMatrix(pack(jnp.array([[-2, -1, 0, 1]]), 2), jnp.ones((1, 1)), jnp.full((1, 1), -.5), 2)
  assert dequantize(four).tolist() == [[-1.5, -.5, .5, 1.5]]


def test_integer_products_are_exact():
  """With integers for x and scales of 1 the result is the exact integer, although the sums exceed 2^24."""
  q_OI = jnp.full((3, 2048), 127, jnp.int8)
  x_MI = jnp.full((2, 2048), 127.)
  y = quantized_matmul(x_MI, QuantizedMatrix(q_OI, jnp.ones((1, 3))), activations='int8')
  assert (y == 127 * 127 * 2048).all()


def test_the_gradient_by_x_is_that_of_the_dequantized_matrix_and_w_is_frozen():
  case = CASES['W4A16']
  x_MI, *arrays = case.arguments()
  w, g_MO = case.matrix(*arrays), jnp.ones((case.rows, case.outputs))
  y, pull = jax.vjp(lambda x, scale: quantized_matmul(x, QuantizedMatrix(w.values, scale, bits=4)), x_MI, w.scale_QO)
  dx_MI, dscale_QO = pull(g_MO)
  close(dx_MI, g_MO @ dequantize(w), 1e-5)
  assert not dscale_QO.any() and y.shape == g_MO.shape


@hypothesis.given(strategies.integers(1, 70), strategies.integers(1, 4), strategies.integers(1, 9),
                  strategies.sampled_from([8, 4, 2]), strategies.sampled_from([None, 'int8']), strategies.booleans())
@hypothesis.settings(max_examples=4, deadline=None)
def test_any_size(rows, groups, outputs, bits, activations, symmetric):
  case = Case(rows, groups * 16, outputs, Scheme(bits, 16, activations, symmetric=symmetric))
  got, wanted = jax.jit(lambda arguments: (case.call('xla')(*arguments), case.expected(*arguments)))(case.arguments())
  close(got, wanted, 1e-5)


def test_operands_that_do_not_suit_each_other_are_refused():
  w = quantize(jnp.ones((4, 16)))
  with pytest.raises(ValueError, match='x has 8 inputs and w 16'): quantized_matmul(jnp.ones((2, 8)), w)
  with pytest.raises(ValueError, match="choose None or 'int8'"):
    quantized_matmul(jnp.ones((2, 16)), w, activations='float8_e4m3fn')
  with pytest.raises(ValueError, match='must divide 16 inputs'): quantize(jnp.ones((4, 16)), 4, 5)


BF16 = jnp.bfloat16
TPU_CASES = {   # Rows and outputs are no multiples of a tile, and there are several steps.
  'W8A8': (Case(5, 256, 64, W8A8), TpuTiles(32, 128, 128)),
  'float8': (Case(5, 128, 64, F8, BF16), TpuTiles(32, 128, 128)),
  'W2A8': (Case(3, 512, 64, W2A8), TpuTiles(32, 128, 128)),
  'W8A16': (Case(3, 256, 64, W8A16), TpuTiles(32, 128, 128)),
  'W4A16, bfloat16': (Case(40, 512, 136, W4A16, BF16), TpuTiles(32, 128, 128)),
  'W4A16, groups longer than a step': (Case(3, 1024, 32, Scheme(4, 512)), TpuTiles(32, 128, 128)),
  'W4A16, short groups and zero points': (Case(3, 512, 32, Scheme(4, 32, symmetric=False)), TpuTiles(32, 128, 256)),
}


@pytest.mark.thinned
@pytest.mark.parametrize('name', TPU_CASES)
def test_the_tpu_kernel_equals_the_reference(name):
  """The kernel is interpreted: uninitialised memory is NaN, and races are reported."""
  from jax.experimental.pallas import tpu as pltpu
  interpreter = importlib.import_module('jax._src.pallas.mosaic.interpret.interpret_pallas_call')
  case, tiles = TPU_CASES[name]
  arguments = case.arguments()
  with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True, uninitialized_memory='nan')):
    got = case.call('pallas_tpu', tiles)(*arguments)
  close(got, case.expected(*arguments), case.tolerance)
  races = interpreter.get_races() if hasattr(interpreter, 'get_races') else interpreter.races
  assert not races.races_found


GPU_CASES = {   # There are more steps than stages, so that each buffer is used again.
  'W4A16 of one row, in parts': (Case(1, 1024, 64, W4A16, BF16), FewTiles(256, 2, 2)),
  'W4A16 of few rows, groups longer than a step': (Case(12, 512, 128, Scheme(4, 256), BF16), FewTiles(128, 1, 2)),
  'W4A16 of few rows, groups of 64': (Case(3, 512, 64, Scheme(4, 64), BF16), FewTiles(128, 1, 2)),
  'W8A16 of few rows': (Case(3, 768, 64, W8A16, BF16), FewTiles(128, 2, 2)),
  'W4A8 of few rows': (Case(3, 768, 64, W4A8, BF16), FewTiles(128, 2, 2)),
  'W2A8 of few rows': (Case(3, 1024, 64, W2A8, BF16), FewTiles(256, 1, 2)),
  'float8 of few rows': (Case(3, 256, 64, F8, BF16), FewTiles(128, 1, 2)),
  'W8A8': (Case(300, 384, 256, W8A8, BF16), GpuTiles(128, 128, 128, 2)),
  'W8A16': (Case(200, 512, 128, W8A16, BF16), GpuTiles(128, 128, 128, 2)),
  'float8 in clusters': (Case(520, 384, 128, F8, BF16), GpuTiles(128, 64, 128, 2, cluster=2)),
  'W4A16 in clusters, groups longer than a step': (
    Case(200, 512, 512, Scheme(4, 256), BF16), GpuTiles(128, 128, 128, 2, cluster=2)),
}


@pytest.mark.parametrize('name', GPU_CASES)
def test_the_gpu_kernel_equals_the_reference(name, gpu_interpreter):
  case, tiles = GPU_CASES[name]
  arguments = case.arguments()
  close(case.call('pallas_gpu', tiles)(*arguments), case.expected(*arguments), case.tolerance)


@pytest.mark.parametrize('rows', [1, 16, 8192])
@pytest.mark.parametrize('scheme', [W8A8, F8, W4A16, W8A16])
def test_what_tuning_tries_fits(rows, scheme):
  w = jax.eval_shape(lambda: Case(rows, 4096, 14336, scheme).matrix(*Case(rows, 4096, 14336, scheme).arguments()[1:]))
  x_bytes = 1 if scheme.activations else 4
  for tiles in [*sizes.tpu_candidates(rows, w, scheme.activations), sizes.tpu_tiles(rows, w, scheme.activations)]:
    assert tiles.vmem(w.bits, x_bytes) <= sizes.VMEM
  every = sizes.gpu_candidates(rows, w, scheme.activations)
  rounded = bool(scheme.activations)
  if rows <= sizes.FEW_ROWS: assert all(2 * tiles.shared(max(rows, 8), w, rounded) <= sizes.SHARED for tiles in every)
  else: assert all(tiles.shared(w, rounded) <= sizes.SHARED for tiles in every)
  assert len(every) > 3 and len(set(every)) == len(every)
  assert sizes.gpu_tiles(rows, w, scheme.activations) == every[0]


def test_few_rows_are_read_by_all_multiprocessors():
  """Each multiprocessor has about two blocks or more, so that one waits for memory while another computes."""
  for I, O in ((4096, 4096), (14336, 4096), (4096, 14336)):
    w = jax.eval_shape(lambda: quantize(jnp.zeros((O, I)), 4, 128))
    assert O // 64 * sizes.gpu_tiles(1, w, None).parts >= .8 * 2 * 132


REFUSED = {
  'pallas_tpu': {'no multiple of 128': Case(3, 64, 64, W8A8), 'not groups': Case(3, 256, 64, Scheme(8, 128, 'int8')),
                 'nothing to multiply': Case(0, 256, 64, W8A8),
                 'zero points': Case(3, 256, 64, Scheme(8, None, 'int8', symmetric=False)),
                 'needs float8 activations': Case(3, 256, 64, dataclasses.replace(F8, activations=None))},
  'pallas_gpu': {'not bfloat16': Case(3, 256, 64, W8A8), 'no multiples of 64': Case(3, 256, 65, W8A8, BF16),
                 'neither 64 nor': Case(3, 256, 64, Scheme(4, 32), BF16), '2 bits': Case(3, 256, 64, Scheme(2), BF16),
                 'zero points': Case(3, 256, 64, Scheme(4, 128, symmetric=False), BF16)},
}


@pytest.mark.parametrize(('name', 'said'), [(name, said) for name in REFUSED for said in REFUSED[name]])
def test_kernels_say_what_they_do_not_take(name, said):
  case = REFUSED[name][said]
  x_MI, *arrays = case.arguments()
  expected = 'it needs jax 0.11' if name == 'pallas_gpu' and jax.__version_info__ < (0, 11) else said
  assert expected in IMPLEMENTATIONS[name].refuses(x_MI, case.matrix(*arrays), case.scheme.activations)
