"""The fused loss agrees with log-softmax of the logits, in value and gradient."""
import dataclasses
import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies

from efficient_lm.ops.linear_cross_entropy import (
  BACKWARD,
  IMPLEMENTATIONS,
  limits,
  linear_cross_entropy,
  tiles,
  vocabulary,
  xla,
)
from efficient_lm.ops.linear_cross_entropy.cases import CASES, Case, bench
from efficient_lm.ops.linear_cross_entropy.tiles import SHARED_MEMORY, VMEM, GpuTiles, TpuTiles, candidates

pytestmark = pytest.mark.usefixtures('quick_unless_long')


def assert_close(got, wanted, tolerance: float):
  """Every leaf agrees, relative to its largest number."""
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
    assert a.dtype == b.dtype and a.shape == b.shape
    a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
    np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.abs(b).max(initial=1e-6))


@pytest.fixture
def small_chunks(monkeypatch):
  """Chunks small enough that the cases have several."""
  monkeypatch.setattr(xla, 'CHUNK_LOGITS', 200)
  monkeypatch.setattr(xla, 'chunk_width', lambda M, V: min(V, 8))


@functools.cache
def wanted(name):
  return jax.jit(CASES[name].call('reference'))(*CASES[name].arguments())


@pytest.mark.thinned
@pytest.mark.parametrize('way', [xla.BY_TOKENS, xla.BY_VOCABULARY], ids=['by tokens', 'by vocabulary'])
@pytest.mark.parametrize('name', CASES)
def test_equals_the_reference_however_it_is_cut(name, way, small_chunks):
  case = CASES[name]
  got = jax.jit(way[case.of == 'backward'])(*case.arguments())
  assert_close(got, wanted(name), case.tolerance)


@pytest.mark.parametrize('name', ['small', 'bfloat16'])
def test_differentiates_as_the_reference(name):
  case = CASES[name]
  hidden, head, labels = case.arguments()
  weights_T = jnp.arange(1., labels.shape[1] + 1)
  def gradients(implementation):
    mixed = lambda h, w: sum(jnp.sum(part * weights_T) for part in
                             linear_cross_entropy(h, w, labels, implementation=implementation))
    return jax.grad(mixed, (0, 1))(hidden, head)
  tolerance = dataclasses.replace(case, of='backward').tolerance
  assert_close(jax.jit(lambda: gradients('auto'))(), jax.jit(lambda: gradients('reference'))(), tolerance)


@hypothesis.given(strategies.integers(1, 60), strategies.integers(1, 60))
@hypothesis.settings(max_examples=8, deadline=None)
def test_gradients_are_two_products_whatever_the_chunk(V, width):
  rng = np.random.default_rng(V)
  hidden_MD, head_DV, d_MV = (rng.normal(size=shape).astype(np.float32) for shape in ((7, 5), (5, V), (7, V)))
  dlogits = lambda start, width: jax.lax.dynamic_slice_in_dim(jnp.asarray(d_MV), start, width, axis=1)
  got = jax.jit(lambda hidden, head: vocabulary.gradients(dlogits, hidden, head, min(width, V)))(hidden_MD, head_DV)
  assert_close(got, (d_MV @ head_DV.T, hidden_MD.T @ d_MV), 1e-5)   # sums of at most 60 products of normals


def test_equal_logits_cost_the_log_of_the_vocabulary():
  nll, logsumexp = linear_cross_entropy(jnp.ones((1, 3, 4)), jnp.zeros((4, 32)), jnp.array([[0, 5, 31]]))
  np.testing.assert_allclose(nll, np.log(32), rtol=1e-6)
  np.testing.assert_allclose(logsumexp, np.log(32), rtol=1e-6)


def test_each_token_s_gradient_by_the_logits_sums_to_zero():
  """Adding a constant to all logits of a token changes no likelihood. With the identity as head, dhidden is dlogits."""
  logits, labels = jax.random.normal(jax.random.key(0), (2, 5, 40)), jnp.full((2, 5), 7)
  slope = jax.grad(lambda logits: jnp.sum(linear_cross_entropy(logits, jnp.eye(40), labels)[0]))(logits)
  np.testing.assert_allclose(slope.sum(-1), 0, atol=1e-6)   # 40 roundings of numbers below 1
  assert (slope[..., 7] < 0).all() and (np.delete(slope, 7, axis=-1) > 0).all()


@pytest.mark.parametrize('V', [1000, 32000, 128256, 151936])
def test_the_chunks_of_an_accelerator_are_a_quarter_of_the_logits_at_most(V):
  width = vocabulary.width_for(V)
  assert width == V < vocabulary.MIN_WIDTH or width <= max(V / 4, vocabulary.MIN_WIDTH)
  assert V <= vocabulary.MIN_WIDTH or width % vocabulary.TILE == 0


def test_no_pass_keeps_all_logits():
  """The temporary memory of the compiled program, by XLA's count, is a fraction of that of all logits."""
  M, D, V = 1024, 8, 2 ** 17
  for of in ('forward', 'backward'):
    case = Case(1, M, D, V, of=of)
    compiled = jax.jit(case.call('xla')).lower(*jax.eval_shape(case.arguments)).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < M * V * 4 / 4


def test_a_mesh_in_force_cuts_tokens_and_one_device_the_longer_side(mesh):
  assert xla._cut((2, 8), 100) is xla.BY_VOCABULARY and xla._cut((2, 80), 100) is xla.BY_TOKENS
  arguments = jnp.zeros((1, 128, 128), jnp.bfloat16), jnp.zeros((128, 256), jnp.bfloat16)
  assert not limits.tpu(*arguments)
  with mesh(2, 2, 1, 2):
    assert xla._cut((2, 8), 100) is xla.BY_TOKENS
    assert 'shard_map' in IMPLEMENTATIONS['pallas_tpu'].refuses(*arguments)   # compilers cannot cut a kernel


@pytest.mark.parametrize('platform', ['cpu', 'gpu', 'tpu'])
def test_benches_are_of_both_passes_and_can_be_planned(platform):
  for case in bench(platform).values():
    assert len(jax.eval_shape(case.arguments)) == {'forward': 3, 'backward': 6}[case.of]
    assert case.flops > 0 and case.bytes > 0
  assert {case.of for case in bench(platform).values()} == {'forward', 'backward'}


@pytest.mark.parametrize('platform, limit', [('gpu', SHARED_MEMORY), ('tpu', VMEM)])
def test_what_tuning_tries_fits(platform, limit):
  every = candidates(platform, 4096)
  assert len(every) > 5 and len(set(every)) == len(every)
  assert all((tiles.shared_memory() if platform == 'gpu' else tiles.vmem(2)) <= limit for tiles in every)


@pytest.mark.parametrize('table', [IMPLEMENTATIONS, BACKWARD])
@pytest.mark.parametrize('name, shape, dtype, said', [
  ('pallas_tpu', (128, 96, 512), jnp.bfloat16, 'multiple of 128, and is 96'),
  ('pallas_tpu', (4, 128, 512), jnp.float32, 'do not fill'), ('pallas_tpu', (128, 128, 512), jnp.float16, 'bfloat16 or'),
  ('pallas_gpu', (128, 128, 512), jnp.float32, 'needs jax 0.11' if jax.__version_info__ < (0, 11) else 'not float32')])
def test_kernels_say_what_they_do_not_take(table, name, shape, dtype, said):
  M, D, V = shape
  arguments = jnp.zeros((1, M, D), dtype), jnp.zeros((D, V), dtype), jnp.zeros((1, M), jnp.int32)
  assert said in table[name].refuses(*arguments)


KERNEL_CASES = {   # Tokens, D and V are no multiples of a tile; the vocabulary has three chunks, the last one narrower.
  'float32': Case(2, 13, 256, 332, dtype=jnp.float32), 'bfloat16': Case(1, 16, 128, 300, dtype=jnp.bfloat16),
  'certain': Case(1, 16, 128, 140, logits=50.)}


@pytest.fixture
def narrow_chunks(monkeypatch):
  monkeypatch.setattr(vocabulary, 'width_for', lambda V: 128)


@pytest.fixture
def tpu_interpreter():
  """Interprets TPU kernels: uninitialised memory is NaN, and races are reported."""
  from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter
  from jax.experimental.pallas import tpu as pltpu
  parameters = pltpu.InterpretParams(detect_races=True, uninitialized_memory='nan')
  with pltpu.force_tpu_interpret_mode(parameters): yield
  assert not interpreter.races.races_found


@pytest.mark.thinned
@pytest.mark.parametrize('of', ['forward', 'backward'])
@pytest.mark.parametrize('name', KERNEL_CASES)
def test_the_tpu_kernel_equals_the_reference(name, of, tpu_interpreter, narrow_chunks):
  case = dataclasses.replace(KERNEL_CASES[name], of=of)
  got = case.call('pallas_tpu', TpuTiles(16, 128, 128))(*case.arguments())
  assert_close(got, case.call('reference')(*case.arguments()), case.tolerance)


@pytest.mark.parametrize('of', ['forward', 'backward'])
def test_tokens_are_padded_to_the_tiles_that_tuning_found(of, tpu_interpreter, monkeypatch):
  """26 tokens in tiles of 16 rows, where the rule would choose one tile of 32."""
  case = dataclasses.replace(KERNEL_CASES['float32'], of=of)
  monkeypatch.setitem(tiles.TUNED, ('tpu', of, 256, 332), TpuTiles(16, 128, 128))
  monkeypatch.setattr(vocabulary, 'width_for', lambda V: 128)
  from efficient_lm.ops.linear_cross_entropy import pallas_tpu
  run = pallas_tpu.linear_cross_entropy if of == 'forward' else pallas_tpu.backward
  got = run(*case.arguments())
  assert_close(got, case.call('reference')(*case.arguments()), case.tolerance)


@pytest.fixture
def gpu_interpreter(monkeypatch):
  """Interprets GPU kernels as two blocks, and reports races."""
  if jax.__version_info__ < (0, 11): pytest.skip('interprets GPU kernels from jax 0.11 on')
  from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
  from jax.experimental.pallas import mosaic_gpu as plgpu

  from efficient_lm.ops.linear_cross_entropy import pallas_gpu
  monkeypatch.setattr(pallas_gpu, 'H200_CORES', 2)
  with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)): yield
  assert not gpu_callbacks.get_races().races_found


GPU_CASES = {'tokens and V are no multiples': Case(2, 65, 128, 328, dtype=jnp.bfloat16),
             'certain': Case(1, 128, 192, 256, logits=50., dtype=jnp.bfloat16)}


@pytest.mark.parametrize('of', ['forward', 'backward'])
@pytest.mark.parametrize('name', GPU_CASES)
def test_the_gpu_kernel_equals_the_reference(name, of, gpu_interpreter, narrow_chunks):
  case = dataclasses.replace(GPU_CASES[name], of=of)
  got = case.call('pallas_gpu', GpuTiles(64, 128, 64, 2, 2))(*case.arguments())
  assert_close(got, case.call('reference')(*case.arguments()), case.tolerance)
