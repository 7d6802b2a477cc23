"""Every implementation of the grouped product agrees with the reference, in value and in gradient."""
import dataclasses
import functools
import importlib

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_lm.ops import dispatch
from efficient_lm.ops.grouped_matmul import IMPLEMENTATIONS, grouped_matmul, schedule, tiles
from efficient_lm.ops.grouped_matmul.cases import CASES, Case, bench

pytestmark = pytest.mark.usefixtures('quick_unless_long')

# 'auto' is 'xla' on a CPU. Of 'ragged_dot', the tests cover what is added to XLA's product: rows past the groups, and
# rounding.
ON_CPU = [*(('auto', name) for name in CASES), ('ragged_dot', 'empty groups'), ('ragged_dot', 'rows left over'),
          ('ragged_dot', 'no rows at all'), ('ragged_dot', 'bfloat16')]


def assert_close(got, wanted, tolerance: float):
  """Leaves of both trees agree, relative to the largest number of each wanted leaf."""
  for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
    assert ours.dtype == theirs.dtype
    ours, theirs = np.asarray(ours, np.float32), np.asarray(theirs, np.float32)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance * max(1, np.abs(theirs).max(initial=0)))


@functools.cache
def wanted(case: Case):
  """The result of the reference. Rows past the groups are zeros, so that it does not depend on what they hold."""
  x_MI, w_EIO, sizes_E, scale_EO, g_MO = case.arguments()
  inside_M1 = jnp.arange(case.rows)[:, None] < sum(case.sizes)
  return jax.jit(case.call('reference'))(
    jnp.where(inside_M1, x_MI, 0), w_EIO, sizes_E, scale_EO, jnp.where(inside_M1, g_MO, 0))


@pytest.mark.thinned
@pytest.mark.parametrize(('implementation', 'name'), ON_CPU)
def test_equals_the_reference(implementation, name):
  case = CASES[name]
  assert_close(jax.jit(case.call(implementation))(*case.arguments()), wanted(case), case.tolerance)


def test_each_row_meets_its_own_matrix():
  w_E11 = jnp.array([[[10.]], [[100.]], [[1000.]]])
  y = grouped_matmul(jnp.arange(1., 6)[:, None], w_E11, jnp.array([2, 0, 2]))
  assert y[:, 0].tolist() == [10, 20, 3000, 4000, 0]


@pytest.mark.parametrize('dtype', ['int8', 'float8_e4m3fn'])
def test_a_scale_belongs_to_an_output_of_a_group(dtype):
  w_E12 = jnp.array([[[1, 2]], [[3, 4]]], dtype)
  scale_E2 = jnp.array([[1., 10.], [100., 1000.]])
  y = grouped_matmul(jnp.ones((3, 1)), w_E12, jnp.array([1, 1]), scale_E2)
  assert y.tolist() == [[1, 20], [300, 4000], [0, 0]]


@pytest.mark.parametrize('implementation', ['xla', 'reference'])
def test_quantized_weights_are_frozen(implementation):
  x_MI, _, sizes_E, scale_EO, _ = CASES['int8'].arguments()
  w_EIO = jnp.ones((4, 24, 40))
  total = lambda x, w, scale: jnp.nansum(grouped_matmul(x, w, sizes_E, scale, implementation=implementation))
  _, dw_EIO, dscale_EO = jax.grad(total, (0, 1, 2))(x_MI, w_EIO, scale_EO)
  assert not dw_EIO.any() and not dscale_EO.any()


@pytest.mark.parametrize('name', ['rows left over', 'int8 and bfloat16'])
def test_rows_past_the_sum_may_hold_anything(name):
  case = CASES[name]
  x_MI, w_EIO, sizes_E, scale_EO, g_MO = case.arguments()
  assert np.isnan(np.asarray(x_MI[sum(case.sizes):], np.float32)).all()
  cleaned = x_MI.at[sum(case.sizes):].set(7), w_EIO, sizes_E, scale_EO, g_MO.at[sum(case.sizes):].set(7)
  for got, wanted in zip(case.call('xla')(*case.arguments()), case.call('xla')(*cleaned)):
    np.testing.assert_array_equal(got, wanted)


def test_an_implementation_that_does_not_exist_is_refused():
  with pytest.raises(ValueError, match='no implementation'):
    grouped_matmul(*CASES['one group'].arguments()[:4], implementation='cuda')


@pytest.mark.parametrize('implementation, scaled, word', [('ragged_dot', True, 'no scales'), ('xla', False, 'no tiles')])
def test_what_an_implementation_cannot_take_is_said(implementation, scaled, word):
  arguments = CASES['int8' if scaled else 'equal'].arguments()[:4]
  with pytest.raises(ValueError, match=word):
    grouped_matmul(*arguments, implementation=implementation, tiles=None if scaled else tiles.TpuTiles(8, 8, 8))


# All examples have six groups in 240 rows, so that few programs are compiled.
M = 240
six_sizes = st.lists(st.integers(0, 40), min_size=6, max_size=6)
visits = jax.jit(schedule.visits, static_argnums=(1, 2, 3), static_argnames=('empty', 'tail'))


@hypothesis.given(six_sizes, st.sampled_from([(8, 1), (8, 8), (64, 8), (32, 32)]), st.booleans(), st.booleans())
@hypothesis.settings(deadline=None, max_examples=60)
def test_visits_hold_each_row_once(sizes, block_and_align, empty, tail):
  """Each row is in one visit, of its own group; visits are in order of rows, within the bound, and on the grid."""
  (block, align), left_over = block_and_align, M - sum(sizes)
  plan = visits(jnp.array(sizes, jnp.int32), M, block, align, empty=empty, tail=tail)
  group, row, low, high = (np.asarray(field) for field in plan[:4])
  count = int(plan.count)
  assert count <= len(group) and (group[count:] == len(sizes) + 1).all() and not high[count:].any()
  held = [(r + i, g) for g, r, lo, hi in zip(group, row, low, high) for i in range(lo, hi)]
  owners = np.repeat(np.arange(len(sizes) + 1), [*sizes, left_over if tail else 0])
  assert held == list(enumerate(owners))
  assert (row[:count] % align == 0).all() and (np.diff(group[:count]) >= 0).all()
  if empty: assert set(group[:count]) >= set(range(len(sizes)))


@hypothesis.given(six_sizes, st.sampled_from([None, 'int8']))
@hypothesis.settings(deadline=None, max_examples=10)
def test_any_sizes_agree(sizes, weight):
  case = Case(tuple(sizes), M, (8, 16), weight=weight, of='all')
  x_MI, w_EIO, sizes_E, scale_EO, g_MO = case.arguments()
  inside_M1 = jnp.arange(M)[:, None] < sum(sizes)
  clean = jnp.where(inside_M1, x_MI, 0), w_EIO, sizes_E, scale_EO, jnp.where(inside_M1, g_MO, 0)
  assert_close(compiled('xla', weight)(x_MI, w_EIO, sizes_E, scale_EO, g_MO), compiled('reference', weight)(*clean),
               case.tolerance)


@functools.cache
def compiled(implementation, weight):
  return jax.jit(Case((0,) * 6, M, (8, 16), weight=weight, of='all').call(implementation))


@pytest.mark.parametrize('platform', ['cpu', 'gpu', 'tpu'])
def test_cases_to_time_are_what_they_say(platform):
  for case in bench(platform).values():
    x_MI, w_EIO, _, scale_EO, g_MO = arguments = jax.eval_shape(case.arguments)
    assert x_MI.shape[0] == g_MO.shape[0] == case.rows >= sum(case.sizes) and w_EIO.shape == (len(case.sizes), *case.shape)
    assert (scale_EO is None) == (case.weight is None) and case.flops > 0 and case.bytes > 0
    shape = jax.eval_shape(case.call('xla'), *arguments).shape
    assert shape == {'forward': g_MO.shape, 'dgrad': x_MI.shape, 'wgrad': w_EIO.shape}[case.of]


@pytest.mark.parametrize(('kernel', 'case', 'word'), [
  ('pallas_tpu', Case((4,), 4, dtype='float16'), 'neither'), ('pallas_tpu', Case((), 4), 'nothing'),
  ('pallas_gpu', Case((4,), 4, (64, 64)), 'not bfloat16'), ('pallas_gpu', Case((4,), 4, (64, 96), 'bfloat16'), 'multiples'),
  ('pallas_gpu', Case((4,), 4, (64, 64), 'bfloat16', 'int8'), 'multiples'),
  ('pallas_gpu', Case((4,), 4, (64, 64), 'bfloat16'), ''), ('pallas_tpu', Case((4,), 4, weight='int8'), '')])
def test_kernels_say_what_they_refuse(kernel, case, word):
  if kernel == 'pallas_gpu' and jax.__version_info__ < (0, 11): word = 'needs jax 0.11'
  said = IMPLEMENTATIONS[kernel].refuses(*jax.eval_shape(case.arguments)[:4])
  assert word in said and bool(word) == bool(said)


def test_tiles_fit_their_memory():
  """The tiles that the rules choose for the cases to time, and those that tuning tries."""
  for platform, kernel, rule, limit, size in (
      ('tpu', 'pallas_tpu', tiles.tpu_tiles, tiles.VMEM, lambda one, of, x, w: one.vmem(of, x.itemsize, w.itemsize)),
      ('gpu', 'pallas_gpu', tiles.gpu_tiles, tiles.SHARED, lambda one, of, x, w: one.shared(of, w.itemsize))):
    for case in bench(platform).values():
      x_dtype, w_dtype = jnp.dtype(case.dtype), jnp.dtype(case.weight or case.dtype)
      chosen = rule(case.of, case.rows, *case.shape, len(case.sizes), x_dtype, w_dtype)
      _, tried = case.tuning(kernel)
      assert len(tried) > 3 and all(size(one, case.of, x_dtype, w_dtype) <= limit for one in (chosen, *tried))


# TPU kernels are interpreted: races between copies and reads are reported, and uninitialised memory is NaN.

TPU_CASES = {
  'parts of tiles in every dimension': Case((9, 0, 12), 24, (136, 200), 'bfloat16', of='all'),
  'float32': Case((0, 1, 20), 40, of='all'),
  'int8': Case((9, 0, 3), 14, (24, 136), 'bfloat16', 'int8', of='all'),
  'float8': Case((0, 20), 20, (24, 40), 'bfloat16', 'float8_e4m3fn', of='all'),
}


def on_tpu(case: Case):
  """Its result and gradients by the TPU kernels, and whether a race was found."""
  from jax.experimental.pallas import tpu as pltpu

  from efficient_lm.ops.grouped_matmul import pallas_tpu
  interpreter = importlib.import_module('jax._src.pallas.mosaic.interpret.interpret_pallas_call')
  x_MI, w_EIO, sizes_E, scale_EO, g_MO = case.arguments()
  product = lambda x, w: pallas_tpu.grouped_matmul(x, w, sizes_E, scale_EO, tiles=tiles.TpuTiles(16, 128, 128))
  with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True, uninitialized_memory='nan')):
    if case.weight is None:
      y_MO, pull = jax.vjp(product, x_MI, w_EIO)
    else:
      y_MO, pull = jax.vjp(lambda x: product(x, w_EIO), x_MI)
    return (y_MO, *pull(g_MO)), interpreter.races.races_found


@pytest.mark.thinned
@pytest.mark.parametrize('name', TPU_CASES)
def test_tpu_kernels_equal_the_reference(name):
  case = TPU_CASES[name]
  got, raced = on_tpu(case)
  assert_close(got, wanted(case), case.tolerance)
  assert not raced


# Hopper kernels are interpreted as on two multiprocessors: races between warpgroups and copies are reported.

GPU_CASES = {
  'groups meet within tiles': (Case((67, 0, 130, 3), 220, (128, 192), 'bfloat16'), ('forward', 'dgrad', 'wgrad')),
  'few rows, not in whole patterns': (Case((0, 9, 1), 13, (64, 128), 'bfloat16'), ('forward', 'wgrad')),
  'clusters of two blocks': (Case((70, 3), 80, (64, 256), 'bfloat16'), ('forward', 'wgrad')),
  'int8': (Case((70, 0, 3), 80, (128, 128), 'bfloat16', 'int8'), ('forward', 'dgrad')),
  'float8': (Case((0, 70), 80, (64, 128), 'bfloat16', 'float8_e4m3fn'), ('forward',)),
}
GPU_TILES = {'forward': tiles.GpuTiles(128, 64, 128, 2), 'dgrad': tiles.GpuTiles(128, 128, 64, 2),
             'wgrad': tiles.GpuTiles(64, 128, 128, 2)}


@pytest.mark.parametrize(('name', 'of'), [(name, of) for name, (_, passes) in GPU_CASES.items() for of in passes])
def test_gpu_kernels_equal_the_reference(name, of, monkeypatch):
  from jax.experimental.pallas import mosaic_gpu as plgpu
  if not hasattr(plgpu, 'InterpretGPUParams'): pytest.skip('jax interprets GPU kernels from 0.11 on')
  from efficient_lm.ops.grouped_matmul import pallas_gpu
  monkeypatch.setattr(dispatch, 'device', lambda: dispatch.Device('gpu', 'NVIDIA H200', 2))
  interpreter = importlib.import_module('jax._src.pallas.mosaic_gpu.interpret.interpret_pallas_call')
  case = dataclasses.replace(GPU_CASES[name][0], of=of)
  x_MI, w_EIO, sizes_E, scale_EO, g_MO = case.arguments()
  chosen = dataclasses.replace(GPU_TILES[of], cluster=2 if 'clusters' in name else 1)
  with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
    got = {'forward': lambda: pallas_gpu.rows(x_MI, w_EIO, sizes_E, scale_EO, tiles=chosen),
           'dgrad': lambda: pallas_gpu.rows(g_MO, w_EIO, sizes_E, scale_EO, transposed=True, tiles=chosen),
           'wgrad': lambda: pallas_gpu.weights(x_MI, g_MO, sizes_E, tiles=chosen)}[of]()
  assert_close(got, wanted(case), case.tolerance)
  assert not interpreter.get_races().races_found


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('weight', ['int8', 'float8_e4m3fn'])
def test_rounded_rows_are_multiplied_as_they_are_stored(weight, dtype):
  """The result is the reference's; integers are multiplied by integers; the gradient of x is that without rounding."""
  x_MI, w_EIO, sizes_E, scale_EO, g_MO = dataclasses.replace(CASES['int8'], weight=weight, dtype=dtype).arguments()
  def run(implementation): return lambda x: grouped_matmul(x, w_EIO, sizes_E, scale_EO, activations=weight,
                                                           implementation=implementation)
  (y_MO, pull), wanted = jax.vjp(run('auto'), x_MI), run('reference')(x_MI)
  # In float32, sums of 24 products in another order differ by roundings; in bfloat16 results are rounded to 8 bits.
  assert_close(y_MO, wanted, 1e-6 if dtype == 'float32' else 2 ** -8)
  plain = jax.vjp(lambda x: grouped_matmul(x, w_EIO, sizes_E, scale_EO, implementation='xla'), x_MI)[1]
  np.testing.assert_array_equal(pull(g_MO)[0], plain(g_MO)[0])
  assert ('preferred_element_type=int32' in str(jax.make_jaxpr(run('auto'))(x_MI))) == (weight == 'int8')


def test_rounded_rows_need_weights_of_their_dtype():
  x_MI, w_EIO, sizes_E, scale_EO, _ = CASES['int8'].arguments()
  with pytest.raises(ValueError, match="activations='float8_e4m3fn' with matrices of int8"):
    grouped_matmul(x_MI, w_EIO, sizes_E, scale_EO, activations='float8_e4m3fn')


BLACKWELL_CASES = {   # There are more tiles than blocks, so that both halves of tensor memory are used again.
  'groups meet within tiles': Case((67, 0, 130, 3), 220, (128, 192), 'bfloat16'),
  'few rows, not in whole patterns': Case((0, 9, 1), 13, (192, 128), 'bfloat16'),
  'whole tiles': Case((256, 128), 384, (64, 256), 'bfloat16'),
}


@pytest.mark.parametrize('of', ['forward', 'dgrad'])
@pytest.mark.parametrize('name', BLACKWELL_CASES)
def test_blackwell_kernels_equal_the_reference(name, of, gpu_interpreter, monkeypatch):
  from efficient_lm.ops.grouped_matmul import pallas_blackwell
  monkeypatch.setattr(dispatch, 'device', lambda: dispatch.Device('gpu', 'NVIDIA B200', 2))
  case = dataclasses.replace(BLACKWELL_CASES[name], of=of)
  x_MI, w_EIO, sizes_E, _, g_MO = case.arguments()
  assert not pallas_blackwell.refuses(x_MI, w_EIO, sizes_E)
  got = pallas_blackwell.rows(x_MI if of == 'forward' else g_MO, w_EIO, sizes_E, of == 'dgrad',
                              tiles=tiles.BlackwellTiles(128, 64, 2))
  assert_close(got, wanted(case), case.tolerance)


def test_blackwell_tiles_fit():
  assert tiles.BlackwellTiles().shared() <= 227 * 1024
