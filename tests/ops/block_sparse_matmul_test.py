"""The block-sparse product is the dense one with a masked matrix, in value and in gradient, by every implementation."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies

from efficient_lm.ops.block_sparse_matmul import block_sparse_matmul, from_dense, pattern_of, to_dense
from efficient_lm.ops.block_sparse_matmul.cases import CASES, Case, bench


def assert_close(got, wanted, tolerance):
  for got, wanted in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
    assert got.dtype == wanted.dtype and got.shape == wanted.shape
    got, wanted = np.asarray(got, np.float32), np.asarray(wanted, np.float32)
    np.testing.assert_allclose(got, wanted, atol=tolerance * np.abs(wanted).max(initial=1e-30), rtol=0)


@pytest.mark.parametrize('name', CASES)
def test_equals_the_reference(name):
  case = CASES[name]
  arguments = case.arguments()
  wanted = case.call('reference')(*arguments)
  for implementation in ('xla', 'dense'):
    assert_close(jax.jit(case.call(implementation))(*arguments), wanted, case.tolerance)


@pytest.mark.parametrize('name', CASES)
def test_equals_the_dense_product_with_a_masked_matrix(name):
  """Value, and gradient of the matrix: that of the dense one where a block is kept, none elsewhere."""
  case = CASES[name]
  arguments = case.arguments()
  (y, dx, dblocks), (y_dense, dx_dense, dw_dense) = case.call('reference')(*arguments), case.baselines()['dense'](*arguments)
  assert_close((y, dx), (y_dense, dx_dense), case.tolerance)
  kept = np.kron(case.mask, np.ones(case.block, bool))
  dw = to_dense(dblocks, pattern_of(case.mask))
  assert_close(dw, jnp.where(kept, dw_dense, 0), case.tolerance)
  assert not np.asarray(dw)[~kept].any()


@given(strategies.data())
@settings(max_examples=8, deadline=None)
def test_any_mask_any_size(data):
  draw = lambda low, high: data.draw(strategies.integers(low, high))
  M, R, C, I, J = draw(1, 9), draw(1, 5), draw(1, 5), draw(1, 4), draw(1, 4)
  mask = np.array(data.draw(strategies.lists(strategies.booleans(), min_size=R * C, max_size=R * C))).reshape(R, C)
  # Small integers: every order of summation gives the same float32.
  random = np.random.default_rng(draw(0, 9))
  x, w, g = (random.integers(-4, 5, shape).astype(np.float32) for shape in ((M, R * I), (R * I, C * J), (M, C * J)))
  kept = np.kron(mask, np.ones((I, J), bool))
  blocks, pattern = from_dense(w, mask)
  y, pull = jax.vjp(lambda x, blocks: block_sparse_matmul(x, blocks, pattern, implementation='xla'), x, jnp.asarray(blocks))
  dx, dblocks = pull(jnp.asarray(g))
  np.testing.assert_array_equal(y, x @ np.where(kept, w, 0))
  np.testing.assert_array_equal(dx, g @ np.where(kept, w, 0).T)
  np.testing.assert_array_equal(to_dense(dblocks, pattern), np.where(kept, x.T @ g, 0))


@pytest.mark.parametrize('name', CASES)
def test_there_and_back_changes_nothing(name):
  case = CASES[name]
  _, blocks, pattern, _, w_KN = case.arguments()
  again, same = from_dense(to_dense(blocks, pattern), case.mask)
  np.testing.assert_array_equal(again, blocks)
  jax.tree.map(np.testing.assert_array_equal, same, pattern)
  np.testing.assert_array_equal(to_dense(again, same), w_KN)


def test_all_blocks_are_the_dense_product_and_none_is_zero():
  x, w = jnp.arange(12.).reshape(2, 6), jnp.arange(24.).reshape(6, 4)
  for implementation in ('xla', 'dense', 'reference'):
    run = lambda mask, how=implementation: block_sparse_matmul(x, *from_dense(w, mask), implementation=how)
    np.testing.assert_array_equal(run(np.ones((3, 2), bool)), x @ w)
    np.testing.assert_array_equal(run(np.zeros((3, 2), bool)), np.zeros((2, 4)))


def test_a_pattern_is_data_so_that_layers_of_a_scan_may_differ():
  masks = [np.eye(3, dtype=bool), np.roll(np.eye(3, dtype=bool), 1, axis=0), np.array([[1, 1, 1], [0] * 3, [0] * 3], bool)]
  w_LKN = np.random.default_rng(0).normal(size=(3, 12, 12)).astype(np.float32)
  layers = [from_dense(jnp.asarray(w_KN), mask) for w_KN, mask in zip(w_LKN, masks)]
  stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
  x = jnp.ones((2, 12))
  got, _ = jax.jit(lambda x, stacked: jax.lax.scan(lambda x, layer: (block_sparse_matmul(x, *layer), None), x, stacked))(x, stacked)
  for layer in layers: x = x @ to_dense(*layer)
  np.testing.assert_allclose(got, x, rtol=1e-5)


@pytest.mark.parametrize('platform', ['cpu', 'gpu', 'tpu'])
def test_bench_cases_are_what_they_say(platform):
  for name, case in bench(platform).items():
    x, blocks, _, g, w = jax.eval_shape(case.arguments)
    assert case.flops == 2 * x.shape[0] * blocks.size * (3 if case.of == 'all' else 1)
    assert blocks.size == round(case.density * w.size) and f'{case.of}' in name
    assert case.bytes >= (x.size + g.size + blocks.size) * x.dtype.itemsize


def test_what_does_not_fit_is_refused():
  x, blocks, pattern, *_ = Case(4, (2, 2)).arguments()
  with pytest.raises(ValueError, match='inputs'): block_sparse_matmul(x[:, :16], blocks, pattern)
  with pytest.raises(ValueError, match='as many blocks'): block_sparse_matmul(x, blocks[:1], pattern)
  with pytest.raises(ValueError, match='cast'): block_sparse_matmul(x, blocks.astype(jnp.bfloat16), pattern)
  with pytest.raises(ValueError, match='evenly'): from_dense(jnp.zeros((5, 4)), np.ones((2, 2), bool))
