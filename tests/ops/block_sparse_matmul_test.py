"""The block-sparse product is the dense one with a masked matrix, in value and in gradient, by every implementation."""
import dataclasses
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies

from efficient_lm.ops import dispatch
from efficient_lm.ops.block_sparse_matmul import (
  IMPLEMENTATIONS,
  balanced,
  block_sparse_matmul,
  from_dense,
  pattern_of,
  to_dense,
)
from efficient_lm.ops.block_sparse_matmul.cases import CASES, Case, bench
from efficient_lm.ops.block_sparse_matmul.tiles import (
  PASSES,
  SHARED,
  VMEM,
  GpuTiles,
  TpuTiles,
  gpu_candidates,
  gpu_tiles_for,
  tpu_candidates,
  tpu_tiles_for,
)
from efficient_lm.ops.block_sparse_matmul.xla import FEW


def assert_close(got, wanted, tolerance):
  for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
    assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
    ours, theirs = np.asarray(ours, np.float32), np.asarray(theirs, np.float32)
    np.testing.assert_allclose(ours, theirs, atol=tolerance * np.abs(theirs).max(initial=1e-30), rtol=0)


@pytest.mark.thinned
@pytest.mark.parametrize(('implementation', 'name'), [
  *(('xla', name) for name in CASES), *(('dense', name) for name in ('half', 'unequal columns', 'bfloat16'))])
def test_equals_the_reference(implementation, name):
  case = CASES[name]
  arguments = case.arguments()
  assert_close(jax.jit(case.call(implementation))(*arguments), case.call('reference')(*arguments), case.tolerance)


@pytest.mark.parametrize('name', CASES)
def test_equals_the_dense_product_with_a_masked_matrix(name):
  """In value and in gradient. The gradient of the matrix is the dense one in kept blocks, and zero elsewhere."""
  case = CASES[name]
  arguments = case.arguments()
  y, dx, dblocks = case.call('reference')(*arguments)
  x_MI, _, _, g_MO, w_IO = arguments
  product = lambda x, w: jnp.matmul(x, w, preferred_element_type=jnp.float32).astype(x.dtype)
  y_dense, pull = jax.vjp(product, x_MI, w_IO)
  dx_dense, dw_dense = pull(g_MO)
  assert_close((y, dx), (y_dense, dx_dense), case.tolerance)
  kept = np.kron(case.mask, np.ones(case.block, bool))
  dw = to_dense(dblocks, pattern_of(case.mask))
  assert_close(dw, jnp.where(kept, dw_dense, 0), case.tolerance)
  assert not np.asarray(dw)[~kept].any()


@pytest.mark.thinned
@pytest.mark.parametrize('rows', [FEW, FEW + 7])
@pytest.mark.parametrize('name', [name for name in CASES if CASES[name].balanced and CASES[name].density])
def test_of_equal_columns_it_is_the_same_in_value_and_gradient(name, rows):
  """Of few rows and of more, by a pattern that is told by the rows of each column alone."""
  case = dataclasses.replace(CASES[name], M=rows)
  x, blocks, pattern, g, _ = arguments = case.arguments()
  told = balanced(pattern.rows_Z.reshape(case.grid[1], -1), case.grid[0])
  jax.tree.map(np.testing.assert_array_equal, told, pattern)
  run = lambda x, blocks: block_sparse_matmul(x, blocks, told, equal_columns=True, implementation='xla')
  assert_close(jax.jit(lambda *a: case._passes(run, *a))(x, blocks, g), case.call('reference')(*arguments), case.tolerance)


def test_unequal_columns_cannot_be_promised_to_be_equal():
  blocks, pattern = from_dense(np.ones((4, 6), np.float32), np.array([[1, 1, 0], [1, 0, 0]], bool)[:, :2])
  with pytest.raises(ValueError, match='3 blocks in 2 columns: they cannot keep equally many'):
    block_sparse_matmul(jnp.ones((2, 4)), jnp.asarray(blocks), pattern, equal_columns=True)


@given(strategies.data())
@settings(max_examples=5, deadline=None)
def test_any_mask_any_size(data):
  draw = lambda low, high: data.draw(strategies.integers(low, high))
  M, R, C, U, V = draw(1, 9), draw(1, 5), draw(1, 5), draw(1, 4), draw(1, 4)
  mask = np.array(data.draw(strategies.lists(strategies.booleans(), min_size=R * C, max_size=R * C))).reshape(R, C)
  # Operands are small integers, so that every order of summation gives the same float32.
  random = np.random.default_rng(draw(0, 9))
  x, w, g = (random.integers(-4, 5, shape).astype(np.float32) for shape in ((M, R * U), (R * U, C * V), (M, C * V)))
  kept = np.kron(mask, np.ones((U, V), bool))
  blocks, pattern = from_dense(w, mask)
  y, pull = jax.vjp(lambda x, blocks: block_sparse_matmul(x, blocks, pattern, implementation='xla'), x, jnp.asarray(blocks))
  dx, dblocks = pull(jnp.asarray(g))
  np.testing.assert_array_equal(y, x @ np.where(kept, w, 0))
  np.testing.assert_array_equal(dx, g @ np.where(kept, w, 0).T)
  np.testing.assert_array_equal(to_dense(dblocks, pattern), np.where(kept, x.T @ g, 0))


@pytest.mark.parametrize('name', CASES)
def test_kept_blocks_of_the_dense_matrix_are_the_kept_blocks(name):
  case = CASES[name]
  _, blocks, pattern, _, w_IO = case.arguments()
  again, same = from_dense(to_dense(blocks, pattern), case.mask)
  np.testing.assert_array_equal(again, blocks)
  jax.tree.map(np.testing.assert_array_equal, same, pattern)
  np.testing.assert_array_equal(to_dense(again, same), w_IO)


def test_all_blocks_are_the_dense_product_and_none_is_zero():
  x, w = jnp.arange(12.).reshape(2, 6), jnp.arange(24.).reshape(6, 4)
  for implementation in ('xla', 'dense', 'reference'):
    run = lambda mask, how=implementation: block_sparse_matmul(x, *from_dense(w, mask), implementation=how)
    np.testing.assert_array_equal(run(np.ones((3, 2), bool)), x @ w)
    np.testing.assert_array_equal(run(np.zeros((3, 2), bool)), np.zeros((2, 4)))


def test_a_pattern_is_data_so_that_layers_of_a_scan_may_differ():
  masks = [np.eye(3, dtype=bool), np.roll(np.eye(3, dtype=bool), 1, axis=0), np.array([[1, 1, 1], [0] * 3, [0] * 3], bool)]
  w_LIO = np.random.default_rng(0).normal(size=(3, 12, 12)).astype(np.float32)
  layers = [from_dense(jnp.asarray(w_IO), mask) for w_IO, mask in zip(w_LIO, masks)]
  stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
  x = jnp.ones((2, 12))
  through = lambda x, layers: jax.lax.scan(lambda x, layer: (block_sparse_matmul(x, *layer), None), x, layers)[0]
  got = jax.jit(through)(x, stacked)
  for layer in layers: x = x @ to_dense(*layer)
  np.testing.assert_allclose(got, x, rtol=1e-5)


# The kernels are interpreted: uninitialised memory is NaN, and races are reported. Tiles are small, so that there are
# several.
TPU = {
  'rows left over, an empty column': (Case(40, (3, 2), (128, 128), 0.3, balanced=False), TpuTiles(16, 16, 32, 3, 2)),
  'two cores, fewer blocks than stages': (Case(64, (2, 3), (128, 256), 0.4, False, 'bfloat16'), TpuTiles(32, 16, 64, 4, 2)),
}


@pytest.mark.thinned
@pytest.mark.parametrize('name', TPU)
def test_the_tpu_kernels_equal_the_reference(name):
  from jax.experimental.pallas import tpu as pltpu

  from efficient_lm.ops.block_sparse_matmul import pallas_tpu
  interpreter = importlib.import_module('jax._src.pallas.mosaic.interpret.interpret_pallas_call')
  case, tiles = TPU[name]
  x, blocks, pattern, g, _ = arguments = case.arguments()
  run = lambda x, blocks: pallas_tpu.block_sparse_matmul(x, blocks, pattern, tiles=tiles)
  with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(
      detect_races=True, uninitialized_memory='nan', out_of_bounds_reads='raise', dma_execution_mode='on_wait')):
    got = jax.tree.map(np.asarray, case._passes(run, x, blocks, g))
  assert_close(got, case.call('reference')(*arguments), case.tolerance)
  assert not interpreter.races.races_found


GPU = {
  'rows left over, an empty column': (Case(70, (2, 3), (64, 64), 1 / 3, False, 'bfloat16'), GpuTiles(128, 64, 2, 2)),
  'wide blocks': (Case(128, (2, 1), (64, 128), 0.5, dtype='bfloat16'), GpuTiles(128, 64, 3, 2)),
}


@pytest.mark.parametrize('name', GPU)
@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason='jax interprets GPU kernels from 0.11 on')
def test_the_gpu_kernels_equal_the_reference(name, monkeypatch):
  from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
  from jax.experimental.pallas import mosaic_gpu as plgpu

  from efficient_lm.ops.block_sparse_matmul import pallas_gpu
  monkeypatch.setattr(pallas_gpu, 'H200_CORES', 2)
  case, tiles = GPU[name]
  x, blocks, pattern, g, _ = arguments = case.arguments()
  run = lambda x, blocks: pallas_gpu.block_sparse_matmul(x, blocks, pattern, tiles=tiles)
  with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
    got = jax.tree.map(np.asarray, case._passes(run, x, blocks, g))
  assert_close(got, case.call('reference')(*arguments), case.tolerance)
  assert not gpu_callbacks.get_races().races_found


def test_blocks_are_paired_within_their_column():
  """Each block is the first or the second of exactly one pair."""
  from efficient_lm.ops.block_sparse_matmul.pallas_gpu import pairs
  mask = np.random.default_rng(0).random((5, 7)) < 0.4
  mask[:, 2] = False
  pattern = pattern_of(mask)
  first, column, count = (np.asarray(a) for a in pairs(jnp.asarray(pattern.column_starts), int(mask.sum())))
  seen = [q for p in range(count[0]) for q in (first[p], first[p] + 1) if q < pattern.column_starts[column[p] + 1]]
  assert seen == list(range(mask.sum()))
  assert all(pattern.columns_Z[first[p]] == column[p] for p in range(count[0])) and len(first) >= count[0]


def test_tiles_fit_their_memory():
  for case in bench('tpu').values():
    (R, C), (U, V) = case.grid, case.block
    sizes = R * U, C * V, U, V
    assert gpu_tiles_for(case.M, *sizes).shared(U, V) <= SHARED and gpu_candidates(U, V)
    if U < 128: continue
    assert all(tpu_tiles_for(case.M, *sizes, 2).vmem(of, *sizes, 2) <= VMEM for of in PASSES) and tpu_candidates(*sizes, 2)


def test_auto_takes_the_kernels_where_they_are_for(monkeypatch):
  def auto(kind, platform, case):
    monkeypatch.setattr(dispatch, 'device', lambda: dispatch.Device(platform, kind))
    arguments = jax.eval_shape(case.arguments)[:3]
    return next(name for name, one in IMPLEMENTATIONS.items()
                if set(one.on if one.auto is None else one.auto) & set(dispatch.device().families)
                and not one.refuses(*arguments))
  small, large = Case(8, (2, 2)), Case(512, (4, 4), (128, 128), dtype='bfloat16')
  kernel = 'pallas_gpu' if jax.__version_info__ >= (0, 11) else 'dense'
  assert auto('cpu', 'cpu', large) == 'xla'
  assert auto('NVIDIA H200', 'gpu', large) == kernel and auto('TPU v6 lite', 'tpu', large) == 'pallas_tpu'
  for device in (('NVIDIA H200', 'gpu'), ('TPU v6 lite', 'tpu')): assert auto(*device, small) == 'dense'
  assert auto('NVIDIA A100', 'gpu', large) == 'dense'


@pytest.mark.parametrize('platform', ['cpu', 'gpu', 'tpu'])
def test_bench_cases_are_what_they_say(platform):
  for name, case in bench(platform).items():
    x, blocks, _, g, w = jax.eval_shape(case.arguments)
    assert case.flops == 2 * x.shape[0] * blocks.size * (3 if case.of == 'all' else 1)
    assert blocks.size == round(case.density * w.size) and f'{case.of}' in name
    assert case.bytes >= (x.size + g.size + blocks.size) * x.dtype.itemsize


def test_sizes_and_dtypes_that_do_not_agree_are_refused():
  x, blocks, pattern, *_ = Case(4, (2, 2)).arguments()
  with pytest.raises(ValueError, match='inputs'): block_sparse_matmul(x[:, :16], blocks, pattern)
  with pytest.raises(ValueError, match='as many blocks'): block_sparse_matmul(x, blocks[:1], pattern)
  with pytest.raises(ValueError, match='cast'): block_sparse_matmul(x, blocks.astype(jnp.bfloat16), pattern)
  with pytest.raises(ValueError, match='evenly'): from_dense(jnp.zeros((5, 4)), np.ones((2, 2), bool))
