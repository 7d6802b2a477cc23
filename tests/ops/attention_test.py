"""The fast attention agrees with the reference in value and gradient, on every kind of mask."""
import contextlib
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_lm.ops import dispatch
from efficient_lm.ops.attention import IMPLEMENTATIONS, attention, cudnn, reference, splash
from efficient_lm.ops.attention.cases import CASES, Case, bench

pytestmark = pytest.mark.usefixtures('quick_unless_long')


def assert_close(got, wanted, tolerance):
  for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
    assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
    ours, theirs = np.asarray(ours, np.float32), np.asarray(theirs, np.float32)
    np.testing.assert_allclose(ours, theirs, atol=tolerance * max(1, np.abs(theirs).max()), rtol=0)


@pytest.mark.thinned
@pytest.mark.parametrize('name', CASES)
def test_equals_the_reference(name):
  case = CASES[name]
  arguments = case.arguments()
  assert_close(jax.jit(case.call('xla'))(*arguments), case.call('reference')(*arguments), case.tolerance)


def test_scores_are_scaled_as_asked():
  qkv = CASES['one strip'].arguments()[:3]
  plain, scaled = (attention(*qkv, scale=scale) for scale in (None, 0.3))
  np.testing.assert_allclose(scaled, attention(*qkv, scale=0.3, implementation='reference'), atol=2e-5)
  assert np.abs(scaled - plain).max() > 1e-2


@pytest.mark.parametrize('name', ['documents and window', 'decode with window'])
def test_a_soft_cap_agrees_with_the_reference_in_value_and_gradient(name):
  case = CASES[name]
  arguments = case.arguments()
  run = lambda implementation: case._passes(
    lambda *qkv, **options: attention(*qkv, softcap=.7, implementation=implementation, **options))
  assert_close(jax.jit(run('xla'))(*arguments), run('reference')(*arguments), case.tolerance)


def test_the_reference_bounds_scores_as_the_equation_says():
  q, k, v = (np.asarray(x, np.float64) for x in inputs(7, N=2, K=2))
  scores = np.einsum('BTNH,BSNH->BNTS', q, k) * 8 ** -0.5
  weights = np.exp(np.where(np.tril(np.ones((7, 7), bool)), .5 * np.tanh(scores / .5), -np.inf))
  expected = np.einsum('BNTS,BSNH->BTNH', weights / weights.sum(-1, keepdims=True), v)
  capped = attention(*map(jnp.float32, (q, k, v)), softcap=.5, implementation='reference')
  np.testing.assert_allclose(capped, expected, atol=1e-5)
  assert np.abs(attention(*map(jnp.float32, (q, k, v))) - capped).max() > 1e-2, 'it changes something'


@pytest.mark.parametrize('name', ['jax', 'cudnn', 'splash'])
def test_what_has_no_soft_cap_refuses_it(name):
  qkv = inputs(256)
  why = IMPLEMENTATIONS[name].refuses(*qkv, start=0, segments_BS=None, window=None, scale=1., softcap=5.)
  assert 'soft cap' in why
  with pytest.raises(ValueError): attention(*qkv, softcap=5., implementation=name)


def inputs(T, N=4, K=2, H=8):
  keys = jax.random.split(jax.random.key(T), 3)
  return tuple(jax.random.normal(key, (2, T, heads, H)) for key, heads in zip(keys, (N, K, K)))


def test_no_output_depends_on_a_later_token():
  q, k, v = inputs(20)
  later = lambda a: a.at[:, 12:].add(1.0)
  np.testing.assert_array_equal(attention(q, k, v)[:, :12], attention(q, later(k), later(v))[:, :12])


def test_queries_at_an_offset_equal_those_rows_of_the_whole():
  q, k, v = inputs(20)
  part = jax.jit(lambda start: attention(q[:, 12:15], k, v, start=start))(12)
  np.testing.assert_allclose(part, attention(q, k, v)[:, 12:15], atol=1e-5)   # other shapes sum in another order


# The arguments of cuDNN, computed by XLA's attention. cuDNN itself does not run here.
@pytest.mark.parametrize('name', ['grouped heads', 'values of another size', 'window across strips',
                                  'documents and window', 'bfloat16'])
def test_what_cudnn_is_asked_for_is_this_attention(name):
  case = CASES[name]
  arguments = case.arguments()
  run = lambda *qkv, **options: cudnn.attention(*qkv, scale=case.dims[0] ** -0.5, implementation='xla', **options)
  assert_close(jax.jit(case._passes(run))(*arguments), case.call('reference')(*arguments), case.tolerance)


def test_cudnn_never_sees_a_head_dim_that_it_does_not_take(monkeypatch):
  seen = []
  monkeypatch.setattr(jax.nn, 'dot_product_attention', lambda q, k, v, **_: seen.append((q, k, v)) or q)
  q, k, v = inputs(6, H=12)
  assert cudnn.attention(q, k, v[..., :5], scale=1.).shape == (2, 6, 4, 5)
  assert {x.shape[-1] for x in seen[0]} == {16}


def options(start=0, segments_BS=None, window=None, scale=1.):
  return dict(start=start, segments_BS=segments_BS, window=window, scale=scale)


def arrays(T=128, S=None, H=64, dtype=jnp.bfloat16):
  S = T if S is None else S
  return tuple(jax.ShapeDtypeStruct((2, length, 4, H), dtype) for length in (T, S, S))


def test_auto_trains_with_cudnn_on_gpu_with_splash_on_tpu_and_with_ours_elsewhere(monkeypatch):
  def auto(kind, platform, qkv, **some):
    monkeypatch.setattr(dispatch, 'device', lambda: dispatch.Device(platform, kind))
    monkeypatch.setattr(jax, 'default_backend', lambda: platform)
    here = dispatch.device().families
    return next(name for name, one in IMPLEMENTATIONS.items()
                if set(one.on if one.auto is None else one.auto) & set(here) and not one.refuses(*qkv, **options(**some)))
  ids = jax.ShapeDtypeStruct((2, 128), jnp.int32)
  packed = 'cudnn' if jax.__version_info__ >= (0, 11) else 'xla'
  assert auto('NVIDIA H200', 'gpu', arrays(), segments_BS=ids) == packed
  assert auto('NVIDIA A100-SXM4-80GB', 'gpu', arrays(), window=5) == 'cudnn'
  assert auto('TPU v5e', 'tpu', arrays(), segments_BS=ids) == 'splash'
  assert auto('cpu', 'cpu', arrays()) == 'xla'
  for device in (('NVIDIA H200', 'gpu'), ('TPU v5e', 'tpu')):
    assert auto(*device, arrays(T=1, S=128), start=40) == auto(*device, arrays(T=128), start=jnp.int32(0)) == 'xla'
  assert auto('NVIDIA H200', 'gpu', arrays(dtype=jnp.float32)) == auto('NVIDIA A100', 'gpu', arrays(H=200)) == 'xla'
  assert auto('NVIDIA H200', 'gpu', arrays(T=127), segments_BS=ids) == auto('AMD MI300X', 'gpu', arrays()) == 'xla'
  assert auto('TPU v5e', 'tpu', arrays(T=64)) == 'xla'
  assert auto('NVIDIA H200', 'gpu', arrays()) == 'cudnn'
  monkeypatch.setattr(jax, 'default_backend', lambda: 'cpu')   # compiled for that GPU on a machine without one
  assert 'traced' in IMPLEMENTATIONS['cudnn'].refuses(*arrays(), **options())


# The interpreter that reports races cannot map a kernel over a batch; the other interpreter can.
SPLASH = {
  'documents, tokens left over, grouped heads': (Case((1, 150, 150), (2, 1), documents=3), True),
  'window over several blocks': (Case((1, 300, 300), (1, 1), window=140), True),
  'a batch, values of another size': (Case((2, 256, 256), (4, 2), (16, 8), documents=3), False),
}


@pytest.mark.thinned
@pytest.mark.parametrize('name', SPLASH)
def test_splash_equals_the_reference(name):
  """The kernel is interpreted: uninitialised memory is NaN, and races are reported."""
  from jax.experimental.pallas import tpu as pltpu
  interpreter = importlib.import_module('jax._src.pallas.mosaic.interpret.interpret_pallas_call')
  case, races = SPLASH[name]
  arguments = case.arguments()
  run = lambda *qkv, **options: splash.attention(*qkv, scale=case.dims[0] ** -0.5, block=128, interpret=not races, **options)
  mode = pltpu.InterpretParams(detect_races=True, uninitialized_memory='nan')
  with pltpu.force_tpu_interpret_mode(mode) if races else contextlib.nullcontext():
    got = jax.tree.map(np.asarray, case._passes(run)(*arguments))
  assert_close(got, case.call('reference')(*arguments), case.tolerance)
  if races: assert not interpreter.races.races_found


@pytest.mark.parametrize('case', [CASES['documents and window'], CASES['prefill with documents'], CASES['decode'],
                                  *bench('cpu').values()], ids=str)
def test_the_flops_of_a_case_are_those_of_its_mask(case):
  ids = case.segments_BS if case.documents else None
  mask = reference.visible(*case.tokens[1:], case.start, ids, case.window)
  pairs = int(mask.sum()) * (case.tokens[0] if ids is None else 1)
  assert case.flops == 2 * pairs * case.heads[0] * sum(case.dims) * {'forward': 1, 'all': 3}[case.of]


@pytest.mark.parametrize('platform', ['cpu', 'gpu', 'tpu'])
def test_bench_cases_can_be_called(platform):
  for name, case in bench(platform).items():
    shapes = jax.eval_shape(case.arguments)
    assert case.of in name and case.bytes >= sum(x.size * x.dtype.itemsize for x in shapes[:4])
    jax.eval_shape(case.call('xla'), *shapes)
