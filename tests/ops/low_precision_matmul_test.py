"""Products in eight bits equal those of rounded operands, stochastic rounding is unbiased, and programs multiply
integers."""
import contextlib
import functools
import re

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from efficient_lm.ops.absmax import largest
from efficient_lm.ops.contract import contract
from efficient_lm.ops.grouped_matmul import grouped_matmul
from efficient_lm.ops.low_precision_matmul import (
  FORMATS,
  low_precision_contract,
  low_precision_grouped_matmul,
  low_precision_matmul,
  rounding,
  xla,
)
from efficient_lm.ops.low_precision_matmul.cases import CASES, PASSES, Case, bench


@pytest.fixture(scope='module', autouse=True)
def _quick(quick_compilation):
  """Compilation takes nearly all the time of these tests; what they state holds for any program."""


@contextlib.contextmanager
def optimized():
  """Compiles with the optimizations that programs have where they are used."""
  jax.config.update('jax_disable_most_optimizations', False)
  yield
  jax.config.update('jax_disable_most_optimizations', True)


ALL_INT8 = dict(forward='int8', dgrad='int8', wgrad='int8')
KEY = jax.random.key(3)
draw = lambda *shape, seed=0: jax.random.normal(jax.random.key(seed), shape)


def assert_close(got, wanted, tolerance):
  for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
    assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
    ours, theirs = np.asarray(ours, np.float32), np.asarray(theirs, np.float32)
    assert np.isfinite(theirs).all()
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance * np.abs(theirs).max(initial=0))


@pytest.mark.thinned
@pytest.mark.parametrize('name', CASES)
def test_equals_the_reference(name):
  case = CASES[name]
  assert_close(jax.jit(case.call('xla'))(*case.arguments()), jax.jit(case.call('reference'))(*case.arguments()),
               case.tolerance)


six_sizes = st.lists(st.integers(0, 10), min_size=6, max_size=6)   # in 60 rows, so that one program serves all


@functools.cache
def grouped_passes(implementation):
  def run(x, w, g, sizes_E):
    product = lambda x, w: low_precision_grouped_matmul(x, w, sizes_E, **ALL_INT8, key=KEY, implementation=implementation)
    return both_passes(product, x, w, g)
  return jax.jit(run)


@hypothesis.given(six_sizes)
@hypothesis.settings(deadline=None, max_examples=30)
def test_groups_of_any_sizes_equal_the_reference(sizes):
  operands = draw(60, 9), draw(6, 9, 13, seed=1), draw(60, 13, seed=2), jnp.array(sizes)
  assert_close(grouped_passes('xla')(*operands), grouped_passes('reference')(*operands), 1e-5)


def both_passes(product, x, w, g):
  y, pull = jax.vjp(product, x, w)
  return y, *pull(g)


def jitted(product, *operands):
  """`both_passes` as one program: op by op it takes longer."""
  return jax.jit(functools.partial(both_passes, product))(*operands)


@pytest.mark.parametrize('rounded', [(), *((name,) for name in PASSES)], ids=str)
@pytest.mark.parametrize('groups', [None, (5, 0, 40)], ids=['dense', 'groups'])
def test_a_pass_without_a_format_is_the_plain_one_bit_for_bit_and_one_with_is_not(rounded, groups):
  x, g = draw(48, 16), draw(48, 24, seed=1)
  w = draw(*(() if groups is None else (3,)), 16, 24, seed=2)
  formats = dict.fromkeys(rounded, 'int8')
  ours, plain = functools.partial(low_precision_matmul, **formats), functools.partial(contract, 'MI,IO->MO')
  if groups is not None:
    sizes_E = jnp.array(groups)
    ours = lambda x, w: low_precision_grouped_matmul(x, w, sizes_E, **formats)
    plain = lambda x, w: grouped_matmul(x, w, sizes_E)
  for name, a, b in zip(PASSES, jitted(ours, x, w, g), jitted(plain, x, w, g), strict=True):
    assert np.array_equal(a, b) == (name not in rounded), name


@pytest.mark.parametrize('format', FORMATS)
@pytest.mark.parametrize('size', [1, 1e-12, 1e12])
def test_round_to_nearest_errs_by_half_a_step(format, size):
  a = draw(50, 70) ** 3 * size
  values, scale = jax.jit(rounding.rounded, static_argnums=(1, 2))(a, 1, format)
  y = a / scale
  half = 0.5 if format == 'int8' else rounding._step(y, jnp.dtype(format)) / 2
  # The product that undoes the scale rounds too.
  assert (jnp.abs(values.astype(jnp.float32) - y) <= half + jnp.abs(y) * 2 ** -22).all()
  assert (jnp.abs(values.astype(jnp.float32)).max(axis=1) == largest(format)).all()


@pytest.mark.parametrize('format', FORMATS)
def test_stochastic_rounding_takes_a_neighbour_and_is_unbiased(format):
  a = jnp.concatenate([draw(6, 64) ** 3, 10. ** -jnp.linspace(0, 9, 64)[None], jnp.zeros((1, 64))])
  draws = 4096
  def once(key):
    values, scale = rounding.rounded(a, 1, format, rounding.noise(key, a.shape))
    return values.astype(jnp.float32) * scale
  found = jax.jit(lambda keys: jax.lax.map(once, keys, batch_size=256))(jax.random.split(KEY, draws))
  _, scale = rounding.rounded(a, 1, format)
  step = rounding._step(a / scale, jnp.dtype(format)) * scale * jnp.ones_like(a)
  assert (jnp.abs(found - a) <= step * (1 + 1e-5)).all()
  # The mean of values that are a step apart has a deviation of at most half a step over the root of their number: five
  # deviations.
  assert (jnp.abs(found.mean(0) - a) <= step * (2.5 * draws ** -0.5 + 2 ** -16)).all()
  assert (found[:, :7].std(0).mean(1) > 0).all() and not found[:, 7].any()


def test_round_to_nearest_is_biased():
  """It rounds a thousand gradients of a third of a step to 0 each; stochastic rounding keeps their sum."""
  x, w, g = jnp.ones((1, 1)), jnp.ones((1, 2)), jnp.array([[127., 0.3]])
  gradient = lambda key: jax.vjp(lambda w: low_precision_matmul(x, w, wgrad='int8', key=key), w)[1](g)[0]
  second = jnp.array([[0., 1.]])   # a weight that passes on the second of two gradients
  dgradient = lambda key: jax.vjp(lambda x: low_precision_matmul(x, second, dgrad='int8', key=key), x)[1](g)[0]
  assert not dgradient(None).any()
  total = jnp.sum(jax.vmap(dgradient)(jax.random.split(KEY, 1000)))
  assert 230 < total < 370   # 300, of deviation 14
  np.testing.assert_allclose(gradient(None), g, rtol=1e-6)   # the only number of a column determines its scale


def test_noise_is_uniform_and_differs_between_keys():
  bits = rounding.noise(KEY, (300, 301))
  assert bits.shape == (300, 301) and bits.dtype == jnp.uint16
  counts = np.bincount(np.asarray(bits).ravel() >> 12, minlength=16)
  # A count of 90300 / 16 has a deviation of 73: five deviations.
  assert np.abs(counts - bits.size / 16).max() < 365
  assert np.mean(np.asarray(bits) == np.asarray(rounding.noise(jax.random.key(4), (300, 301)))) < 0.001


def test_a_key_changes_gradients_and_nothing_else():
  x, w, g = draw(8, 16), draw(16, 24, seed=1), draw(8, 24, seed=2)
  run = lambda key: jitted(functools.partial(low_precision_matmul, **ALL_INT8, key=key), x, w, g)
  nearest, one, same, other = run(None), run(KEY), run(KEY), run(jax.random.key(4))
  np.testing.assert_array_equal(one[0], nearest[0])
  for i in (1, 2):
    np.testing.assert_array_equal(one[i], same[i])
    assert (one[i] != nearest[i]).any() and (one[i] != other[i]).any()
    step = jnp.abs(g).max() / 127
    assert jnp.abs(one[i] - nearest[i]).max() < step * jnp.abs(w if i == 1 else x).max() * 24


def test_a_sum_too_long_for_int32_is_summed_in_runs():
  """The int32 sum of 2^18 products of 127^2 would overflow."""
  S = 2 ** 18
  assert S * 127 ** 2 > 2 ** 31 and xla.LONGEST * 127 ** 2 < 2 ** 31
  y = jax.jit(lambda: low_precision_matmul(jnp.ones((1, S)), jnp.ones((S, 1)), forward='int8'))()
  np.testing.assert_allclose(y, S, rtol=1e-6)


def test_runs_have_scales_of_their_own_and_padding_changes_nothing(monkeypatch):
  x, w, g = draw(10, 7), draw(7, 5, seed=1), draw(10, 5, seed=2)
  monkeypatch.setattr(xla, 'LONGEST', 4)
  y, dx, dw = jitted(functools.partial(low_precision_matmul, **ALL_INT8, key=KEY), x, w, g)
  exact = jitted(jnp.matmul, x, w, g)
  for got, wanted in zip((y, dx, dw), exact): assert jnp.abs(got - wanted).max() < 0.1 and (got != wanted).any()
  monkeypatch.setattr(xla, 'LONGEST', 100)
  alone = [low_precision_matmul(x[:, rows], w[rows], forward='int8') for rows in (slice(0, 4), slice(4, 7))]
  np.testing.assert_allclose(y, sum(alone), rtol=1e-5, atol=1e-6)


EQUATIONS = ['BTD,DF->BTF', 'BTNH,NHD->BTD', 'BTD,VD->BTV', 'BTD,EDF->BTEF', 'BTEF,EFD->BTED', 'BTNH,RNH->BTNR']


@pytest.mark.thinned
@pytest.mark.parametrize('equation', EQUATIONS)
def test_an_equation_is_the_einsum_to_rounding(equation):
  sizes = dict(B=2, T=5, D=12, N=3, H=4, F=20, V=7, E=3, R=6)
  shapes = [[sizes[letter] for letter in axes] for axes in equation.replace('->', ',').split(',')]
  x, w, g = (draw(*shape, seed=i) for i, shape in enumerate(shapes))
  wanted = jitted(functools.partial(jnp.einsum, equation), x, w, g)
  got = jitted(functools.partial(low_precision_contract, equation, **ALL_INT8), x, w, g)
  for a, b in zip(got, wanted, strict=True):
    # Up to 30 terms, whose factors err by up to 1/254 of the largest number of their row or column: a few percent of a sum.
    assert a.shape == b.shape and 0 < jnp.abs(a - b).max() < 0.05 * jnp.abs(b).max()
  plain = low_precision_contract(equation, x, w, forward=None)
  np.testing.assert_array_equal(plain, contract(equation, x, w))


def test_the_dense_product_of_every_expert_is_the_grouped_one():
  x, w = draw(6, 12), draw(3, 12, 8, seed=1)
  every = low_precision_contract('BTD,EDF->BTEF', x[None], w, forward='int8')[0]
  grouped = low_precision_grouped_matmul(x, w, jnp.array([2, 0, 4]), forward='int8')
  np.testing.assert_allclose(grouped, every[jnp.arange(6), jnp.array([0, 0, 2, 2, 2, 2])], rtol=1e-6, atol=1e-6)


def test_rows_past_the_groups_may_hold_anything():
  case = CASES['groups, float8']
  arguments = case.arguments()
  assert np.isnan(arguments[0][sum(case.sizes):]).all()
  cleaned = [jnp.nan_to_num(a, nan=7.) for a in arguments[:3]] + [arguments[3]]
  run = jax.jit(case.call('xla'))
  for got, wanted in zip(run(*arguments), run(*cleaned), strict=True): np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize('sizes', [None, (16, 0, 48)], ids=['dense', 'groups'])
@pytest.mark.parametrize('of', PASSES)
def test_integers_are_multiplied_in_the_compiled_program(of, sizes):
  with optimized(): check_products(of, sizes)


def check_products(of, sizes):
  case = Case((64, 64, 64), sizes=sizes, stochastic=True, of=of)
  program = jax.jit(case.call('xla')).lower(*case.arguments()).compile().as_text()
  assert products(program) == {('s32', 's8', 's8')}
  plain = jax.jit(Case((64, 64, 64), (None,) * 3, sizes, of=of).call('xla')).lower(*case.arguments()).compile().as_text()
  assert not any('s32' in types for types in products(plain))


def products(program: str) -> set[tuple[str, ...]]:
  """Dtypes of result and operands of every product in a compiled program."""
  typed = dict(re.findall(r'(%[\w.-]+) = (\w+)\[', program))
  return {(result, typed[a], typed[b]) for result, a, b in re.findall(
    r'= (\w+)\[[^ ]* dot\((?:\w+\[[^ ]* )?(%[\w.-]+), (?:\w+\[[^ ]* )?(%[\w.-]+)\)', program)}


def test_zeros_stay_zeros_and_everything_finite():
  outcome = jitted(functools.partial(low_precision_matmul, **ALL_INT8, key=KEY), *map(jnp.zeros, ((3, 4), (4, 5), (3, 5))))
  assert not any(np.asarray(array).any() for array in outcome)


@pytest.mark.parametrize('options, message', [
  (dict(forward='int4'), "forward = 'int4': choose one of int8"), (dict(wgrad='bfloat16'), "wgrad = 'bfloat16'"),
  (dict(forward='int8', implementation='cublas'), "no implementation 'cublas'")])
def test_what_cannot_be_is_refused(options, message):
  with pytest.raises(ValueError, match=message): low_precision_matmul(jnp.ones((2, 3)), jnp.ones((3, 4)), **options)


def test_an_equation_that_sums_one_operand_alone_is_refused():
  with pytest.raises(ValueError, match='one operand alone'):
    low_precision_contract('BTD,DF->BF', jnp.ones((1, 2, 3)), jnp.ones((3, 4)), forward='int8')


@pytest.mark.parametrize('platform', ['cpu', 'gpu', 'tpu'])
def test_benches_can_be_evaluated_abstractly(platform):
  for case in bench(platform).values():
    arguments = jax.eval_shape(case.arguments)
    result = jax.eval_shape(case.call('xla'), *arguments)
    assert result.dtype == arguments[0].dtype and case.flops > 0 and case.bytes > 0
    assert [jax.eval_shape(f, *arguments).shape for f in case.baselines().values()] == [result.shape]
