"""The divergences in chunks agree with their equations, and have the properties of divergences."""
import dataclasses
import functools
import math

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies

from efficient_lm.ops.linear_cross_entropy import linear_cross_entropy, xla
from efficient_lm.ops.linear_cross_entropy import vocabulary as chunks
from efficient_lm.ops.linear_divergence import (
  IMPLEMENTATIONS,
  KINDS,
  SAMPLED,
  TOP_K,
  equations,
  linear_divergence,
  linear_sampled_cross_entropy,
  linear_top_k_divergence,
  vocabulary,
)
from efficient_lm.ops.linear_divergence.cases import CASES, Case, bench
from efficient_lm.ops.linear_divergence.tiles import (
  SHARED_MEMORY,
  VMEM,
  GpuTiles,
  TpuTiles,
  candidates,
  gpu_shared_memory,
  tpu_tiles_for,
  tpu_vmem,
)

pytestmark = pytest.mark.usefixtures('quick_unless_long')

V = 12


@pytest.fixture
def small_chunks(monkeypatch):
  """Chunks small enough that the cases have several, the last one padded or narrower."""
  monkeypatch.setattr(xla, 'CHUNK_LOGITS', 300)
  monkeypatch.setattr(xla, 'chunk_width', lambda M, V: min(V, 16))


def assert_close(got, wanted, tolerance: float, least: float = 0.):
  """Every leaf agrees, relative to its largest number or to `least`."""
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
    assert a.dtype == b.dtype and a.shape == b.shape
    a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
    assert np.isfinite(b).all()
    np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * max(least, np.abs(b).max()))


def assert_both(case, implementation, tiles=None, compiled=True):
  """Value and gradients of a case of both passes agree with the reference."""
  # Where large logits make a student sure of a token, its gradient is a small difference of numbers near 1.
  least = 1. if case.logits > 1 else 0.
  value, gradients = (jax.jit if compiled else lambda f: f)(case.call(implementation, tiles))(*case.arguments())
  expected, slopes = wanted(case)
  assert_close(value, expected, dataclasses.replace(case, of='forward').tolerance)
  assert_close(gradients, slopes, case.tolerance, least)


@functools.cache
def wanted(case):
  return jax.jit(case.call('reference'))(*case.arguments())


CUTS = [(name, cut) for name, case in CASES.items() if case.of == 'both'
        for cut in ('tokens', 'vocabulary')[:2 if case.signal == 'dense' else 1]]


@pytest.mark.thinned
@pytest.mark.parametrize('name, cut', CUTS)
def test_equals_the_reference_in_value_and_gradient_however_it_is_cut(name, cut, small_chunks, monkeypatch):
  monkeypatch.setattr(xla, 'by_vocabulary', lambda tokens, V: cut == 'vocabulary')
  assert_both(CASES[name], 'xla')


def test_the_value_alone_is_that_of_both_passes(small_chunks):
  for name in ('reverse KL', 'sampled'):
    case = CASES[name]
    assert_close(jax.jit(case.call('xla'))(*case.arguments()), wanted(CASES[f'{name}, both'])[0], case.tolerance)


def logits_of(seed: int, deviation: float = 1.):
  """Logits (1, 6, V), and an identity as head: the hidden state is the logits."""
  return deviation * jax.random.normal(jax.random.key(seed), (1, 6, V)), jnp.eye(V)


def softmax(logits, temperature=1.):
  e = np.exp(np.float64(logits) / temperature - np.max(np.float64(logits) / temperature, -1, keepdims=True))
  return e / e.sum(-1, keepdims=True)


def by_hand(p, q, kind, beta):
  """The divergence in float64, from positive probabilities."""
  kl = lambda p, q: np.sum(p * np.log(p / q), -1)
  m = beta * p + (1 - beta) * q
  return {'forward_kl': lambda: kl(p, q), 'reverse_kl': lambda: kl(q, p),
          'jensen_shannon': lambda: beta * kl(p, m) + (1 - beta) * kl(q, m)}[kind]()


@pytest.mark.parametrize('kind', KINDS)
@hypothesis.given(strategies.integers(0, 99), strategies.sampled_from([.5, 1., 3.]), strategies.floats(.05, .95))
@hypothesis.settings(max_examples=4, deadline=None)
def test_is_what_its_equation_says(kind, seed, temperature, beta):
  (student, eye), (teacher, _) = logits_of(seed), logits_of(seed + 100)
  p, q = softmax(teacher, temperature), softmax(student, temperature)
  for implementation in ('xla', 'reference'):
    got = linear_divergence(student, eye, teacher, eye, kind=kind, beta=beta, temperature=temperature,
                            implementation=implementation)
    np.testing.assert_allclose(got, by_hand(p, q, kind, beta), rtol=1e-4, atol=2e-6)   # float32 differences of logarithms
    assert (np.asarray(got) > -1e-6).all()


@pytest.mark.parametrize('kind', KINDS)
def test_a_teacher_equal_to_the_student_has_divergence_0_and_pulls_nowhere(kind):
  student, eye = logits_of(0, 3.)
  value, slope = jax.value_and_grad(lambda s: jnp.sum(linear_divergence(s, eye, student, eye, kind=kind)))(student)
  # Value and gradient are differences of equal numbers, with errors of a few times 2**-24.
  assert abs(float(value)) < 5e-6 and np.abs(slope).max() < 1e-6


def test_jensen_shannon_at_one_half_is_symmetric_and_bounded_by_the_log_of_two():
  (student, eye), (teacher, _) = logits_of(0, 4.), logits_of(1, 4.)
  run = functools.partial(linear_divergence, kind='jensen_shannon')
  np.testing.assert_allclose(run(student, eye, teacher, eye), run(teacher, eye, student, eye), rtol=1e-5)
  apart = 200 * jax.nn.one_hot(jnp.array([[0, 1]]), V), 200 * jax.nn.one_hot(jnp.array([[2, 3]]), V)
  np.testing.assert_allclose(run(apart[0], eye, apart[1], eye), np.log(2), rtol=1e-5)
  assert (run(student, eye, teacher, eye) < np.log(2)).all()


@pytest.mark.parametrize('kind', KINDS)
def test_all_tokens_listed_is_the_divergence_of_the_whole(kind):
  (student, eye), (teacher, _) = logits_of(0), logits_of(1)
  order = jnp.argsort(-teacher, axis=-1)
  listed = jnp.take_along_axis(jax.nn.log_softmax(teacher / 2), order, axis=-1)
  by_list = lambda s: linear_top_k_divergence(s, eye, order, listed, kind=kind, temperature=2.)
  whole = lambda s: linear_divergence(s, eye, teacher, eye, kind=kind, temperature=2.)
  for function in (lambda f: f(student), lambda f: jax.grad(lambda s: jnp.sum(f(s)))(student)):
    np.testing.assert_allclose(function(by_list), function(whole), atol=2e-6)   # logarithms of about 3, a few roundings


@pytest.mark.parametrize('kind', KINDS)
def test_fewer_listed_tokens_never_make_it_larger(kind):
  (student, eye), (teacher, _) = logits_of(0), logits_of(1)
  order = jnp.argsort(-teacher, axis=-1)
  listed = jnp.take_along_axis(jax.nn.log_softmax(teacher), order, axis=-1)
  run = lambda A: linear_top_k_divergence(student, eye, order[..., :A], listed[..., :A], kind=kind,
                                          implementation='reference')
  # The teacher's smallest probability here is 0.004; as the difference of 1 and the others it has an error of 2**-23: 3e-5
  # of it.
  assert (np.diff([run(A) for A in (1, 3, 6, V - 1, V)], axis=0) > -3e-5).all()


def test_the_tokens_that_are_not_listed_count_as_one():
  """With the teacher's masses the divergence is 0, however the student divides the mass of the tokens that are not
  listed."""
  p = jnp.array([.5, .3] + [.2 / (V - 2)] * (V - 2))
  q = jnp.array([.5, .3, .2] + [1e-9] * (V - 3))
  ids, listed = jnp.array([[[0, 1]]]), jnp.log(p[None, None, :2])
  loss = lambda logits: linear_top_k_divergence(logits, jnp.eye(V), ids, listed)[0, 0]
  value, slope = jax.value_and_grad(loss)(jnp.log(q)[None, None])
  assert abs(float(value)) < 1e-6 and np.abs(slope).max() < 1e-6


def test_one_certain_token_listed_or_drawn_is_the_cross_entropy():
  hidden, head = jax.random.normal(jax.random.key(0), (2, 5, 8)), jax.random.normal(jax.random.key(1), (8, 30))
  labels = jax.random.randint(jax.random.key(2), (2, 5), 0, 30)
  losses = (lambda h, w: linear_cross_entropy(h, w, labels)[0],
            lambda h, w: linear_top_k_divergence(h, w, labels[..., None], jnp.zeros((2, 5, 1))),
            lambda h, w: linear_sampled_cross_entropy(h, w, labels[..., None], jnp.full((2, 5, 1), 3)))
  values = [(f(hidden, head), jax.grad(lambda h, w: jnp.sum(f(h, w)), (0, 1))(hidden, head)) for f in losses]
  for other in values[1:]: assert_close(other, values[0], 1e-5)   # sums of 30 terms in another order


def test_samples_are_counted_in_any_order_and_none_is_0():
  student, eye = logits_of(0)
  draws = jax.random.randint(jax.random.key(1), (1, 6, 40), 0, V)
  counts = jax.nn.one_hot(draws, V).sum(-2)
  one_by_one = linear_sampled_cross_entropy(student, eye, draws, jnp.ones_like(draws))
  counted = linear_sampled_cross_entropy(student, eye, jnp.broadcast_to(jnp.arange(V), (1, 6, V)), counts)
  np.testing.assert_allclose(one_by_one, counted, rtol=1e-5)
  np.testing.assert_allclose(counted, -np.sum(counts / 40 * np.log(softmax(student)), -1), rtol=1e-5)
  assert (linear_sampled_cross_entropy(student, eye, draws, jnp.zeros_like(draws)) == 0).all()


@pytest.mark.parametrize('signal, kind', [('dense', 'reverse_kl'), ('sampled', '')])   # others see CASES
def test_logits_of_two_hundred_stay_finite(signal, kind, small_chunks):
  case = Case((2, 7), (16, 16), 40, signal, kind or 'forward_kl', logits=200., of='both')
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.jit(case.call('xla'))(*case.arguments())))


def test_nothing_pulls_on_the_teacher():
  (student, eye), (teacher, _) = logits_of(0), logits_of(1)
  for implementation in ('xla', 'reference'):
    slopes = jax.grad(lambda t, w: jnp.sum(linear_divergence(student, eye, t, w, implementation=implementation)), (0, 1))(
      teacher, eye)
    assert all((leaf == 0).all() for leaf in slopes)


def test_no_pass_keeps_all_logits():
  """Temporary memory, by XLA's count, is that of a few chunks; all logits would be sixteen chunks."""
  for of in ('forward', 'both'):
    case = Case((1, 2048), (8, 16), 2 ** 16, of=of)
    compiled = jax.jit(case.call('xla')).lower(*jax.eval_shape(case.arguments)).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 8 * xla.CHUNK_LOGITS * 4 < 2048 * 2 ** 16 * 4


@pytest.mark.parametrize('options, said', [(dict(kind='kl'), "no divergence 'kl'"), (dict(beta=1.), 'between 0 and 1'),
                                           (dict(temperature=0.), 'positive')])
def test_a_wrong_option_is_refused(options, said):
  student, eye = logits_of(0)
  with pytest.raises(ValueError, match=said): linear_divergence(student, eye, student, eye, **options)


def test_another_vocabulary_is_refused():
  student, eye = logits_of(0)
  with pytest.raises(ValueError, match='vocabulary of 12, teacher with 11'):
    linear_divergence(student, eye, student, eye[:, 1:])


@pytest.mark.parametrize('platform', ['cpu', 'gpu', 'tpu'])
def test_benches_can_be_planned(platform):
  for case in bench(platform).values():
    arguments = jax.eval_shape(case.arguments)
    assert case.flops > 0 and case.bytes > 0 and len(arguments) == {'forward': 4, 'both': 5}[case.of]


def random_logits(seed: int, deviation: float, width: int = 7):
  """Two rows of logits of a student, and two of a teacher."""
  return (deviation * jax.random.normal(jax.random.key(seed + i), (2, width)) for i in range(2))


@pytest.mark.parametrize('kind', KINDS)
@hypothesis.given(strategies.integers(0, 99), strategies.sampled_from([.5, 1., 3.]), strategies.floats(.05, .95))
@hypothesis.settings(max_examples=5, deadline=None)
def test_the_slope_is_the_derivative(kind, seed, temperature, beta):
  measure = equations.Measure(kind, beta, temperature)
  student, teacher = random_logits(seed, 2.)
  _, *statistics = equations.statistics(measure, student, teacher)
  got = equations.slope(measure, student, teacher, *(x[:, None] for x in statistics), measure.rate)
  slope = jax.grad(lambda student: jnp.sum(equations.statistics(measure, student, teacher)[0]))(student)
  # Both are probabilities times logarithms of ratios up to e^30, with errors of 2**-24 of 30, divided by the temperature.
  assert_close(got, slope, 2 * 2. ** -24 * 30 / temperature + 1e-6, least=1.)


@pytest.mark.parametrize('kind', KINDS)
def test_the_slope_is_finite_where_probabilities_are_0_and_sums_to_0(kind):
  measure = equations.Measure(kind)
  student, teacher = random_logits(0, 400.)
  _, *statistics = equations.statistics(measure, student, teacher)
  slope = equations.slope(measure, student, teacher, *(x[:, None] for x in statistics), 1.)
  # Logits of a thousand have errors of 2**-14, times the remaining probabilities.
  np.testing.assert_allclose(slope.sum(-1), 0, atol=2e-4)


@hypothesis.given(strategies.integers(1, 8), strategies.integers(0, 99))
@hypothesis.settings(max_examples=3, deadline=None)
def test_sums_of_parts_are_those_of_the_whole(first, seed):
  """The values of a kernel, two logsumexps and the mean of a - b under softmax(a), combine; an empty part changes
  nothing."""
  def values(a, b):
    total_1, mean = jax.nn.logsumexp(a, axis=-1, keepdims=True), jnp.sum(jax.nn.softmax(a) * (a - b), -1)
    return total_1[..., 0], jax.nn.logsumexp(b, axis=-1), mean
  a, b = random_logits(seed, 3., 9)
  nothing = tuple(jnp.full(2, fill) for fill in (equations.NONE, equations.NONE, 0.))
  parts = equations.combined(values(a[:, :first], b[:, :first]), values(a[:, first:], b[:, first:]))
  for got in (parts, equations.combined(nothing, parts)): assert_close(got, values(a, b), 1e-5)   # sums of nine


@hypothesis.given(strategies.integers(0, 99), strategies.integers(1, 9), strategies.integers(-5, 20))
@hypothesis.settings(max_examples=5, deadline=None)
def test_both_ways_of_adding_at_listed_columns_do(seed, A, start):
  """Ids may repeat, and may lie before the chunk, in it or after it."""
  rng = np.random.default_rng(seed)
  x_MC, ids_MA, values_MA = rng.normal(size=(3, 8)), rng.integers(0, 30, (3, A)), rng.normal(size=(3, A))
  wanted = x_MC.copy()
  for m, a in np.ndindex(3, A):
    if 0 <= ids_MA[m, a] - start < 8: wanted[m, ids_MA[m, a] - start] += values_MA[m, a]
  for way in (vocabulary._compared, vocabulary._scattered):
    got = way(jnp.float32(x_MC), jnp.asarray(ids_MA - start), jnp.float32(values_MA))
    np.testing.assert_allclose(got, wanted, atol=1e-5)   # sums of at most ten


@pytest.mark.parametrize('platform, limit, size', [('gpu', SHARED_MEMORY, gpu_shared_memory),
                                                   ('tpu', VMEM, lambda tiles: tpu_vmem(tiles, 2))])
def test_what_tuning_tries_fits(platform, limit, size):
  every = candidates(platform, 4096)
  assert len(every) > 5 and len(set(every)) == len(every)
  assert all(size(tiles) <= limit for tiles in every)


@hypothesis.given(strategies.integers(16, 9999), strategies.integers(1, 64), strategies.integers(128, 200_000),
                  strategies.sampled_from([2, 4]))
@hypothesis.settings(max_examples=20, deadline=None)
def test_tiles_of_a_tpu_fit_and_divide(M, D, V, itemsize):
  tiles = tpu_tiles_for('forward', M, 128 * D, V, itemsize)
  assert tpu_vmem(tiles, itemsize) <= VMEM and 128 * D % tiles.inner == 0
  assert tiles.rows % 16 == 0 and tiles.columns % 128 == 0
  assert chunks.TILE % tiles.columns == 0 or chunks.width_for(V) == V, 'a chunk begins within a tile'


@pytest.mark.parametrize('table', [IMPLEMENTATIONS, TOP_K, SAMPLED])
@pytest.mark.parametrize('name, shape, dtype, said', [
  ('pallas_tpu', (128, 96, 512), jnp.bfloat16, 'multiple of 128, and is 96'),
  ('pallas_tpu', (4, 128, 512), jnp.float32, 'do not fill'),
  ('pallas_gpu', (128, 128, 512), jnp.float32, 'needs jax 0.11' if jax.__version_info__ < (0, 11) else 'not float32')])
def test_kernels_say_what_they_do_not_take(table, name, shape, dtype, said):
  M, D, V = shape
  arguments = jnp.zeros((1, M, D), dtype), jnp.zeros((D, V), dtype), jnp.zeros((1, M, 7)), jnp.zeros((7, V))
  assert said in table[name].refuses(*arguments, temperature=1.)


@pytest.fixture
def narrow_chunks(monkeypatch):
  monkeypatch.setattr(chunks, 'width_for', lambda V: min(V, 128))


@pytest.fixture
def tpu_interpreter(narrow_chunks):
  """Interprets TPU kernels: uninitialised memory is NaN, and races are found."""
  from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter
  from jax.experimental.pallas import tpu as pltpu
  parameters = pltpu.InterpretParams(detect_races=True, uninitialized_memory='nan')
  with pltpu.force_tpu_interpret_mode(parameters): yield
  assert not interpreter.races.races_found


# Tokens, D and V are no multiples of a tile, and nor is the teacher's width; some vocabularies have two chunks of two
# widths.
TPU_CASES = {
  'forward KL': Case((2, 9), (256, 24), 204),
  'reverse KL': Case((1, 16), (128, 40), 100, kind='reverse_kl', dtype=jnp.bfloat16),
  'Jensen-Shannon, certain': Case((1, 16), (128, 24), 100, kind='jensen_shannon', logits=50.),
  'top 8 and the rest, certain': Case((1, 16), (128, 0), 204, 'top_k', logits=50.),
  'sampled': Case((1, 13), (128, 0), 100, 'sampled', dtype=jnp.bfloat16),
}
TPU = TpuTiles(16, 128, 128)


@pytest.mark.thinned
@pytest.mark.parametrize('name', TPU_CASES)
def test_the_tpu_kernels_equal_the_reference(name, tpu_interpreter):
  assert_both(dataclasses.replace(TPU_CASES[name], of='both'), 'pallas_tpu', TPU, compiled=False)


def test_the_mass_of_other_tokens_is_exact_where_it_is_tiny(tpu_interpreter):
  """A student is sure of a listed token by 60 nats, and the teacher leaves a fifth to the other tokens. As the difference of
  1 and the listed mass, the others would have no mass, and the divergence would be infinite."""
  hidden_BTD, eye = jnp.eye(128)[None, :16] * 60, jnp.eye(128, 256)
  ids_BTA, logprobs_BTA = jnp.arange(16)[None, :, None], jnp.full((1, 16, 1), math.log(.8))
  run = functools.partial(TOP_K['pallas_tpu'].run, kind='forward_kl', beta=.5, temperature=1., tiles=TPU)
  value, slope = jax.value_and_grad(lambda hidden: jnp.sum(run(hidden, eye, ids_BTA, logprobs_BTA)))(hidden_BTD)
  each = .8 * math.log(.8) + .2 * math.log(.2 / 255) + .2 * 60   # each of the 255 other tokens has exp(-60)
  assert float(value) == pytest.approx(16 * each, rel=1e-5)
  np.testing.assert_allclose(slope[0, 0, :3], [.2, -.2 / 255, -.2 / 255], rtol=1e-4)


@pytest.fixture
def gpu_interpreter(narrow_chunks, monkeypatch):
  """Interprets GPU kernels as two blocks, and finds races."""
  if jax.__version_info__ < (0, 11): pytest.skip('interprets GPU kernels from jax 0.11 on')
  from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
  from jax.experimental.pallas import mosaic_gpu as plgpu

  from efficient_lm.ops.linear_cross_entropy import pallas_gpu
  monkeypatch.setattr(pallas_gpu, 'H200_CORES', 2)
  with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)): yield
  assert not gpu_callbacks.get_races().races_found


GPU_CASES = {
  'forward KL': Case((3, 43), (128, 24), 200, dtype=jnp.bfloat16),
  'reverse KL': Case((1, 127), (64, 24), 256, kind='reverse_kl', dtype=jnp.bfloat16),
  'Jensen-Shannon, certain': Case((1, 128), (64, 24), 200, kind='jensen_shannon', logits=50., dtype=jnp.bfloat16),
  'top 8 and the rest': Case((1, 127), (64, 0), 200, 'top_k', dtype=jnp.bfloat16),
}


@pytest.mark.parametrize('name', GPU_CASES)
def test_the_gpu_kernels_equal_the_reference(name, gpu_interpreter):
  assert_both(dataclasses.replace(GPU_CASES[name], of='both'), 'pallas_gpu', GpuTiles(64, 128, 64, 2, 2), compiled=False)
