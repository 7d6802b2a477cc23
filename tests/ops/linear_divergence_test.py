"""The divergences in chunks agree with their equations, and have the properties that divergences have."""
import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies

from efficient_lm.ops.linear_cross_entropy import linear_cross_entropy, xla
from efficient_lm.ops.linear_divergence import (
  KINDS,
  linear_divergence,
  linear_sampled_cross_entropy,
  linear_top_k_divergence,
)
from efficient_lm.ops.linear_divergence.cases import CASES, Case, bench

V = 12


@pytest.fixture
def small_chunks(monkeypatch):
  """Chunks small enough that the cases have several, the last one padded."""
  monkeypatch.setattr(xla, 'CHUNK_LOGITS', 300)


def assert_close(got, wanted, tolerance: float):
  """Every leaf, relative to the largest number of it."""
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
    assert a.dtype == b.dtype and a.shape == b.shape
    a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
    assert np.isfinite(b).all()
    np.testing.assert_allclose(a, b, atol=tolerance * max(1, np.abs(b).max()))


@pytest.mark.parametrize('name', [name for name, case in CASES.items() if case.of == 'forward'])
def test_equals_the_reference_in_value_and_gradient(name, small_chunks):
  forward, backward = CASES[name], CASES[f'{name}, backward']
  *arguments, g_BT = backward.arguments()
  @functools.partial(jax.jit, static_argnums=0)
  def both(implementation, g_BT, *arguments):
    return forward.call(implementation)(*arguments), backward.call(implementation)(*arguments, g_BT)
  for got, wanted, case in zip(both('xla', g_BT, *arguments), both('reference', g_BT, *arguments), (forward, backward)):
    assert_close(got, wanted, case.tolerance)


def logits_of(seed: int, deviation: float = 1.):
  """Logits (1, 6, V), and an identity as head: the hidden state is the logits."""
  return deviation * jax.random.normal(jax.random.key(seed), (1, 6, V)), jnp.eye(V)


def softmax(logits, temperature=1.):
  e = np.exp(np.float64(logits) / temperature - np.max(np.float64(logits) / temperature, -1, keepdims=True))
  return e / e.sum(-1, keepdims=True)


def by_hand(p, q, kind, beta):
  """In float64, from probabilities, where both are positive."""
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
  # Each is a difference of equal numbers, a few times 2**-24.
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
  # The least of the teacher's probabilities here is 0.004, and 1 less the others is known to 2**-23: 3e-5 of it.
  assert (np.diff([run(A) for A in (1, 3, 6, V - 1, V)], axis=0) > -3e-5).all()


def test_what_is_not_listed_is_asked_of_the_student_too():
  """At the teacher's own masses the divergence is 0, however the student divides the rest."""
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


@pytest.mark.parametrize('signal, kind', [*(('dense', kind) for kind in KINDS), ('top_k', 'forward_kl'), ('sampled', '')])
def test_logits_of_two_hundred_stay_finite(signal, kind, small_chunks):
  case = Case((2, 7), (16, 16), 40, signal, kind or 'forward_kl', logits=200., of='backward')
  assert all(np.isfinite(leaf).all() for leaf in jax.jit(case.call('xla'))(*case.arguments()))


def test_nothing_pulls_on_the_teacher():
  (student, eye), (teacher, _) = logits_of(0), logits_of(1)
  for implementation in ('xla', 'reference'):
    slopes = jax.grad(lambda t, w: jnp.sum(linear_divergence(student, eye, t, w, implementation=implementation)), (0, 1))(
      teacher, eye)
    assert all((leaf == 0).all() for leaf in slopes)


def test_no_pass_keeps_all_logits():
  """A few arrays of a chunk, by XLA's own count; those of all tokens would be sixteen times as many."""
  for of in ('forward', 'backward'):
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
    assert case.flops > 0 and case.bytes > 0 and len(arguments) == {'forward': 4, 'backward': 5}[case.of]
