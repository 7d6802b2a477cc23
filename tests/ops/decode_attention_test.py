"""Every implementation of decode attention agrees with the reference, on every kind of cache."""
import importlib
import itertools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies
from jax.experimental.pallas import tpu as pltpu

from efficient_lm.ops.attention import attention
from efficient_lm.ops.decode_attention import decode_attention, pallas_gpu, pallas_tpu, tiles, xla
from efficient_lm.ops.decode_attention.cache import combine
from efficient_lm.ops.decode_attention.cases import CASES, Case, bench
from efficient_lm.ops.decode_attention.tiles import GpuTiles, TpuTiles, candidates
from efficient_lm.ops.quantize import quantize_cache

pytestmark = pytest.mark.usefixtures('quick_unless_long')


def agree(got, wanted, tolerance):
  assert got.dtype == wanted.dtype and got.shape == wanted.shape
  got, wanted = np.asarray(got, np.float32), np.asarray(wanted, np.float32)
  np.testing.assert_allclose(got, wanted, rtol=0, atol=tolerance * max(1, np.abs(wanted).max()))


@pytest.mark.thinned
@pytest.mark.parametrize('implementation', ['blocks', 'xla'])
@pytest.mark.parametrize('name', CASES)
def test_equals_the_reference(name, implementation):
  case = CASES[name]
  arguments = case.arguments()
  agree(*(jax.jit(case.call(name))(*arguments) for name in (implementation, 'reference')), case.tolerance)


@pytest.mark.thinned
@pytest.mark.parametrize('filled', [1.0, 0.2])
@pytest.mark.parametrize('name', [name for name, case in CASES.items() if not case.page and case.slots >= 130])
def test_blocks_of_a_cache_that_is_larger_than_one(name, filled, monkeypatch):
  """A float cache is read in blocks where few slots are visible. Invisible slots hold huge numbers."""
  monkeypatch.setattr(xla, 'BLOCK', 1)
  case = CASES[name]
  q, k, v, lengths, *scales = case.arguments()
  lengths, slot = (lengths * filled).astype(jnp.int32), jnp.arange(case.slots)
  unseen = ((slot >= lengths[:, None]) | (slot < lengths[:, None] - (case.window or case.slots)))[:, None, :, None]
  if not scales: k, v = (jnp.where(unseen, 1e30, x).astype(x.dtype) for x in (k, v))
  agree(*(jax.jit(case.call(name))(q, k, v, lengths, *scales) for name in ('blocks', 'reference')), case.tolerance)


@pytest.mark.parametrize('name', ['window', 'int4 in pages and window'])
def test_a_soft_cap_agrees_with_the_reference(name):
  case = CASES[name]
  arguments = case.arguments()
  names = ['k_scale_BKS', 'v_scale_BKS'] * (len(arguments) > 5) + ['page_table_BS'] * (case.page is not None)
  def run(implementation, *arguments, softcap=.7):
    options = dict(zip(names, arguments[4:]), window=case.window, softcap=softcap)
    return jax.jit(lambda *qkv: decode_attention(*qkv, **options, implementation=implementation))(*arguments[:4])
  expected = run('reference', *arguments)
  for implementation in ('blocks', 'xla'): agree(run(implementation, *arguments), expected, case.tolerance)
  assert np.abs(expected - run('reference', *arguments, softcap=None)).max() > 1e-2, 'it changes something'


def test_kernels_refuse_scales_of_tiles():
  *arguments, k_scale, v_scale, k_shift, v_shift = Case(2, 64, storage='int4 tiles').arguments()
  options = dict(k_scale_BKS=k_scale, v_scale_BKS=v_scale, k_shift=k_shift, v_shift=v_shift)
  assert all('tiles' in module.refuses(*arguments, **options) for module in (pallas_tpu, pallas_gpu))


def test_kernels_refuse_a_soft_cap():
  arguments = Case(2, 64).arguments()[:4]
  assert all('soft cap' in module.refuses(*arguments, softcap=5.) for module in (pallas_tpu, pallas_gpu))


def test_equals_attention_with_a_cache():
  q, k, v, _ = Case(2, 30).arguments()
  cached = attention(q[:, None], k.swapaxes(1, 2), v.swapaxes(1, 2), start=17, window=9, implementation='reference')
  agree(decode_attention(q, k, v, jnp.array([18, 18]), window=9), cached[:, 0], 1e-5)
  cached = attention(q[:, None], k.swapaxes(1, 2), v.swapaxes(1, 2), start=17, softcap=.7, implementation='reference')
  agree(decode_attention(q, k, v, jnp.array([18, 18]), softcap=.7), cached[:, 0], 1e-5)


@pytest.mark.parametrize('implementation', ['reference', 'blocks', 'xla'])
@pytest.mark.parametrize('storage', ['float32', 'int8'])
def test_invisible_slots_may_hold_any_number(implementation, storage):
  q, k, v, _, *scales = Case(2, 40, storage=storage).arguments()
  lengths, window, slot = jnp.array([33, 7]), 20, jnp.arange(40)
  unseen = ((slot >= lengths[:, None]) | (slot < lengths[:, None] - window))[:, None]
  names = ('k_scale_BKS', 'v_scale_BKS')
  run = lambda spoil: decode_attention(q, spoil(k), spoil(v), lengths, window=window, implementation=implementation,
                                       **dict(zip(names, map(spoil, scales))))
  def spoil(x):
    hole = unseen[..., None] if x.ndim == 4 else unseen
    return jnp.where(hole, jnp.full((), 99 if x.dtype == jnp.int8 else 1e30, x.dtype), x)
  np.testing.assert_array_equal(run(spoil), run(lambda x: x))


@pytest.mark.parametrize('implementation', ['reference', 'blocks', 'xla'])
def test_an_empty_cache_gives_zero(implementation):
  q, k, v, _ = Case(2, 20).arguments()
  o = decode_attention(q, k, v, jnp.array([0, 20]), implementation=implementation)
  assert (o[0] == 0).all() and (o[1] != 0).any()


def test_one_visible_value_is_the_result():
  q, k, v, _ = Case(2, 20).arguments()
  last = jnp.repeat(v[jnp.arange(2), :, jnp.array([4, 19])], 2, axis=1)
  agree(decode_attention(q, k, v, jnp.array([5, 20]), window=1), last, 1e-6)


@pytest.mark.parametrize('bits', [8, 4])
def test_scales_may_be_shared_by_a_group_of_tokens(bits):
  q, k, v, lengths = Case(2, 48).arguments()
  (k_int, k_scale), (v_int, v_scale) = (quantize_cache(x, bits=bits, group=16) for x in (k, v))
  assert k_scale.shape == (2, 2, 3)
  repeated = [jnp.repeat(scale, 16, axis=-1) for scale in (k_scale, v_scale)]
  for implementation in ('reference', 'blocks', 'xla'):
    run = lambda k_scale, v_scale: decode_attention(q, k_int, v_int, lengths, k_scale_BKS=k_scale, v_scale_BKS=v_scale,
                                                    implementation=implementation)
    np.testing.assert_array_equal(run(k_scale, v_scale), run(*repeated))


def test_eight_bits_are_close_and_four_are_less_so():
  q, k, v, lengths = Case(4, 256, heads=(4, 2, 64)).arguments()
  exact, error = decode_attention(q, k, v, lengths), {}
  for bits in (8, 4):
    (k_int, k_scale), (v_int, v_scale) = (quantize_cache(x, bits=bits) for x in (k, v))
    o = decode_attention(q, k_int, v_int, lengths, k_scale_BKS=k_scale, v_scale_BKS=v_scale)
    error[bits] = float(jnp.abs(o - exact).max())
  # Half a step of a unit normal is about 3 / 254 in 8 bits, and 3 / 14 in 4; the errors of means over tokens are smaller.
  assert 0 < error[8] < 0.03 and 5 * error[8] < error[4] < 0.4


@hypothesis.given(strategies.data())
@hypothesis.settings(max_examples=15, deadline=None)
def test_any_split_of_the_keys_combines_to_the_whole(data):
  """The partial softmaxes of any pieces, also of empty ones that hold anything, join to the softmax of all."""
  S = data.draw(strategies.integers(1, 20))
  cuts = sorted(data.draw(strategies.lists(strategies.integers(0, S), max_size=4)))
  random = np.random.default_rng(S)
  s, v = 5 * random.normal(size=S), random.normal(size=(S, 3))
  # There are always five splits, so that nothing is compiled again. NaN stands for what a split without keys leaves behind.
  cuts = [0, *[0] * (4 - len(cuts)), *cuts, S]
  m, total, o = np.full(5, np.nan), np.zeros(5), np.full((5, 3), np.nan)
  for i, (begin, end) in enumerate(itertools.pairwise(cuts)):
    if begin == end: continue
    m[i] = s[begin:end].max()
    p = np.exp(s[begin:end] - m[i])
    total[i], o[i] = p.sum(), p @ v[begin:end]
  p = np.exp(s - s.max())
  joined = jax.jit(combine)(*(jnp.asarray(x, jnp.float32)[None, None, None] for x in (o, m, total)))
  np.testing.assert_allclose(joined[0, 0, 0], p @ v / p.sum(), atol=1e-5)


ANY = Case(3, 48, heads=(6, 2, 10), storage='int8', page=8, window=11)
RUN = {name: jax.jit(ANY.call(name)) for name in ('blocks', 'reference')}   # compiled once for all lengths


@hypothesis.given(strategies.lists(strategies.integers(0, 48), min_size=3, max_size=3), strategies.integers(0, 2 ** 30))
@hypothesis.settings(max_examples=25, deadline=None)
def test_any_lengths_and_any_page_table(lengths, seed):
  q, k, v, _, k_scale, v_scale, table = ANY.arguments()
  random = np.random.default_rng(seed)
  table = jnp.asarray(random.integers(0, k.shape[0], table.shape), jnp.int32)   # sequences may share pages
  arguments = q * random.uniform(0, 5), k, v, jnp.array(lengths, jnp.int32), k_scale, v_scale, table
  agree(*(run(*arguments) for run in RUN.values()), ANY.tolerance)


def test_a_gradient_is_refused():
  q, k, v, lengths = Case(1, 4).arguments()
  with pytest.raises(NotImplementedError, match='no gradient'):
    jax.grad(lambda v: decode_attention(q, k, v, lengths).sum())(v)


@pytest.mark.parametrize(('change', 'message'), [
  (lambda q, k, v: (q[:, :3], k, v, {}), 'heads must divide'),
  (lambda q, k, v: (q, k, v.astype(jnp.bfloat16), {}), 'both need the same dtype'),
  (lambda q, k, v: (q, k.astype(jnp.int8), v.astype(jnp.int8), {}), 'scales if and only if'),
  (lambda q, k, v: (q, k, v, {'k_scale_BKS': k[..., 0]}), 'scales if and only if'),
  (lambda q, k, v: (q, k[..., :8], v, {}), 'head dims agree')])
def test_arguments_that_do_not_agree_are_refused(change, message):
  q, k, v, lengths = Case(2, 4).arguments()
  q, k, v, options = change(q, k, v)
  with pytest.raises(ValueError, match=message): decode_attention(q, k, v, lengths, **options)


@pytest.mark.parametrize(('change', 'message'), [
  (lambda given: given | {'k_shift': None}, 'if and only if'),
  (lambda given: given | {'v_shift': None}, 'if and only if'),
  (lambda given: given | {'k_scale_BKS': given['k_scale_BKS'][..., 0]}, 'if and only if'),
  (lambda given: {name: x[..., :1] for name, x in given.items()}, 'each half')])
def test_tiles_that_do_not_agree_are_refused(change, message):
  q, k, v, lengths, *scales = Case(2, 16, storage='int4 tiles').arguments()
  given = dict(zip(('k_scale_BKS', 'v_scale_BKS', 'k_shift', 'v_shift'), scales))
  with pytest.raises(ValueError, match=message): decode_attention(q, k, v, lengths, **change(given))


@pytest.mark.parametrize('platform', ['cpu', 'gpu', 'tpu'])
def test_benches_can_be_evaluated_abstractly(platform):
  for case in bench(platform).values():
    arguments = jax.eval_shape(case.arguments)
    o = jax.eval_shape(case.call('xla'), *arguments)
    assert o.shape == arguments[0].shape and case.flops > 0 and case.bytes > 0


@pytest.mark.thinned
@pytest.mark.parametrize(('case', 'slots'), [
  (Case(3, 300, storage='float32'), 128),
  (Case(2, 256, storage='int8', window=100), 128),
  (Case(2, 130, heads=(4, 1, 16), storage='int4'), 130),
  (Case(3, 128, storage='int8', page=32), 64),
  (Case(2, 96, storage='bfloat16', dtype=jnp.bfloat16, page=16, window=40), 32)], ids=str)
def test_the_tpu_kernel_equals_the_reference(case, slots):
  arguments = case.arguments()
  with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True, uninitialized_memory='nan')):
    got = jax.block_until_ready(case.call('pallas_tpu', TpuTiles(slots))(*arguments))
    assert not importlib.import_module('jax._src.pallas.mosaic.interpret.interpret_pallas_call').races.races_found
  agree(got, case.call('reference')(*arguments), case.tolerance)


def test_the_tpu_kernel_refuses_small_pages():
  q, k, v, lengths, *_, table = Case(2, 16, page=4).arguments()
  assert 'multiple of 8' in pallas_tpu.refuses(q, k, v, lengths, page_table_BS=table)


HALF = dict(dtype=jnp.bfloat16)
GPU_CASES = {   # Parts are shorter than a split, some splits have no visible keys, and rings are used again.
  'bfloat16 in splits': (Case(2, 200, heads=(4, 2, 64), storage='bfloat16', **HALF), GpuTiles(2, 64, 64, 2)),
  'int8, several parts, window': (Case(2, 256, heads=(4, 1, 64), storage='int8', window=100, **HALF), GpuTiles(1, 64)),
  'int8 in pages': (Case(2, 128, heads=(2, 1, 64), storage='int8', page=64, **HALF), GpuTiles(2, 128, 64, 2)),
  'int4': (Case(2, 192, heads=(2, 1, 128), storage='int4', **HALF), GpuTiles(1, 128)),
  'int4, splits, 12 heads a key head': (Case(1, 128, heads=(12, 1, 64), storage='int4', **HALF), GpuTiles(2, 64)),
}


@pytest.mark.parametrize('name', GPU_CASES)
def test_the_gpu_kernel_equals_the_reference(name, gpu_interpreter):
  """The kernel is interpreted, without registers and swizzles."""
  case, chosen = GPU_CASES[name]
  arguments = case.arguments()
  got = jax.block_until_ready(case.call('pallas_gpu', chosen)(*arguments))
  agree(got, case.call('reference')(*arguments), case.tolerance)


def test_the_gpu_kernel_of_an_empty_cache_gives_zero(gpu_interpreter):
  q, k, v, _ = Case(2, 64, heads=(2, 1, 64), storage='bfloat16', **HALF).arguments()
  options = dict(k_scale_BKS=None, v_scale_BKS=None, page_table_BS=None, window=None, scale=1.)
  o = pallas_gpu.decode_attention(q, k, v, jnp.array([0, 64], jnp.int32), **options, tiles=GpuTiles(2, 64))
  assert (o[0] == 0).all() and (o[1] != 0).any()


def test_the_gpu_kernel_says_why_it_refuses():
  from jax.experimental.pallas import mosaic_gpu as plgpu
  if not hasattr(plgpu, 'InterpretGPUParams'): pytest.skip('refuses everything before jax 0.11')
  why = lambda *arguments, **options: pallas_gpu.refuses(*arguments, **options)
  assert 'must be bfloat16' in why(*Case(1, 64, heads=(4, 2, 64)).arguments())
  half = lambda **fields: Case(1, 64, storage='bfloat16', dtype=jnp.bfloat16, **fields).arguments()
  assert 'head dim of 16' in why(*half())
  assert 'at most 32' in why(*half(heads=(64, 1, 64)))
  assert 'multiple of 64' in why(*(paged := half(heads=(4, 2, 64), page=32))[:4], page_table_BS=paged[4])
  assert why(*half(heads=(4, 2, 64))) == ''


def test_tiles_fit_the_devices():
  for bits in (16, 8, 4):
    assert all(tiles.shared_memory(one, 128, bits) <= tiles.SHARED_MEMORY for one in candidates('gpu', 8192, 128, bits))
    assert len(candidates('gpu', 8192, 128, bits, page=64)) > 2 and len(candidates('tpu', 8192, 128, bits, page=128)) > 2
  # One long sequence of few heads still keeps every multiprocessor busy.
  assert 8 * tiles.gpu_tiles_for(8, 131072, 128, 8, num_cores=132).splits >= 132
