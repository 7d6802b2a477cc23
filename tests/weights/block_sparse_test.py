"""A block-sparse weight is the dense one with zeros, in every product and gradient, and holds its blocks alone."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from efficient_lm.errors import IncompatibleError
from efficient_lm.ops.contract import contract
from efficient_lm.tree import num_bytes
from efficient_lm.weights.block_sparse import BlockSparse, grid, kept_in
from efficient_lm.weights.layout import Layout
from efficient_lm.weights.weight import Dense
from tests.weights.every import EQUATIONS, draw

pytestmark = pytest.mark.usefixtures('quick_compilation')

BLOCK = (8, 4)


def sparse(axes, inputs, kept=2, block=BLOCK, stack=()):
  """A weight with `kept` blocks in each column, at random places that differ by layer; and the dense weight that it is."""
  size = dict(zip(axes, draw(axes).shape))
  rng = np.random.default_rng(3)
  dense = Dense(jnp.asarray(rng.normal(size=(*stack, *size.values())), jnp.float32), axes, inputs)
  C, R = grid(dense, block)
  rows = np.sort(rng.random((*stack, C, R)).argsort(-1)[..., :kept], -1)
  weight = kept_in(dense, block, jnp.asarray(rows))
  keep_CR = np.zeros((*stack, C, R), bool)
  np.put_along_axis(keep_CR, rows, True, -1)
  keep_OI = keep_CR.repeat(block[1], -2).repeat(block[0], -1)
  return weight, Dense(jnp.where(Layout.of(dense).array(jnp.asarray(keep_OI)), dense.materialize(), 0), axes, inputs)


@pytest.mark.parametrize('stack', [(), (2, 3)])
@pytest.mark.parametrize('equation, inputs', EQUATIONS)
def test_its_values_are_the_kept_blocks_and_zeros(equation, inputs, stack):
  axes = equation.split('->')[0].split(',')[1]
  weight, dense = sparse(axes, inputs, stack=stack)
  np.testing.assert_array_equal(weight.materialize(), dense.materialize())
  assert (weight.shape, weight.axes, weight.inputs, weight.stack) == (dense.shape, axes, inputs, stack)
  assert jax.eval_shape(lambda: weight).shape == dense.shape, 'known of shapes'
  zeros, = weight.invariants()
  np.testing.assert_array_equal(zeros.keep, dense.materialize() != 0)
  assert zeros.held_by(weight) and zeros.held_by(dense)
  assert weight.num_multiplied == int(np.sum(dense.materialize() != 0))
  C, R = grid(dense, BLOCK)
  assert num_bytes(weight) == 4 * weight.num_multiplied + 4 * 2 * C * int(np.prod(stack, dtype=int))
  assert weight.kind == f'float32, {2 / R:.1%} of its 8 x 4 blocks' and weight.product == 'float, kept blocks alone'


@pytest.mark.thinned
@pytest.mark.parametrize('rows', [(1, 1), (2, 3), (4, 9)], ids=['one', 'few', 'many'])
@pytest.mark.parametrize('equation, inputs', EQUATIONS)
def test_it_multiplies_as_the_dense_weight_and_so_do_its_gradients(equation, inputs, rows):
  """Of a few rows, as decoding has, and of many, as a prompt has: two ways on a CPU."""
  x_axes, axes = equation.split('->')[0].split(',')
  weight, dense = sparse(axes, inputs)
  rng = np.random.default_rng(5)
  x = jnp.asarray(rng.normal(size=(*rows, *draw(x_axes).shape[2:])), jnp.float32)
  graph, params, rest = nnx.split(weight, nnx.Param, ...)
  run = lambda params, x: nnx.merge(graph, params, rest).contract(equation, x)
  y, pull = jax.vjp(run, params, x)
  wanted, pull_dense = jax.vjp(lambda w, x: contract(equation, x, w), dense.materialize(), x)
  g = jnp.asarray(rng.normal(size=y.shape), jnp.float32)
  by_params, dx = pull(g)
  dw, dx_dense = pull_dense(g)
  # Sums of at most 64 products of order one, in another order.
  np.testing.assert_allclose(y, wanted, atol=2e-5)
  np.testing.assert_allclose(dx, dx_dense, atol=2e-5)
  moved = nnx.merge(graph, by_params, rest).materialize()
  np.testing.assert_allclose(moved, np.where(dense.materialize() != 0, dw, 0), atol=2e-5)


@given(st.data())
@settings(max_examples=5, deadline=None)
def test_any_blocks_of_integers_multiply_exactly(data):
  """Small integers: every order of summation gives the same float32."""
  U, V, C, R, M = (data.draw(st.integers(1, high)) for high in (4, 4, 3, 4, 20))
  kept = data.draw(st.integers(1, R))
  rng = np.random.default_rng(data.draw(st.integers(0, 9)))
  dense = Dense(jnp.asarray(rng.integers(-4, 5, (R * U, C * V)), jnp.float32), 'DF', 'D')
  weight = kept_in(dense, (U, V), jnp.asarray(np.sort(rng.random((C, R)).argsort(-1)[:, :kept], -1)))
  x = rng.integers(-4, 5, (1, M, R * U)).astype(np.float32)
  np.testing.assert_array_equal(weight.contract('BTD,DF->BTF', jnp.asarray(x)), x @ np.asarray(weight.materialize()))


def test_all_blocks_are_the_dense_weight():
  weight, dense = sparse('DF', 'D', kept=8)
  assert np.all(dense.materialize() != 0)
  np.testing.assert_allclose(weight.contract('BTD,DF->BTF', draw('BTD')), draw('BTD') @ dense.materialize(), atol=2e-5)


def test_a_product_over_the_outputs_is_that_of_the_dense_weight():
  """As latent attention absorbs one."""
  weight, dense = sparse('RNH', 'R')
  x, equation = draw('BTNH'), 'BTNH,RNH->BTNR'
  np.testing.assert_array_equal(weight.contract(equation, x), dense.contract(equation, x))


def test_layers_of_a_stack_multiply_their_own_blocks():
  weight, dense = sparse('DF', 'D', stack=(3,))
  x = draw('BTD')
  through = jax.jit(lambda one: jax.lax.scan(lambda _, layer: (None, layer.contract('BTD,DF->BTF', x)), None, one)[1])
  np.testing.assert_allclose(through(weight), jnp.einsum('BTD,LDF->LBTF', x, dense.materialize()), atol=2e-5)


def test_a_cast_is_what_products_in_that_dtype_read():
  weight, _ = sparse('DF', 'D')
  x = draw('BTD').astype(jnp.bfloat16)
  cast = weight.cast(jnp.bfloat16)
  assert cast.kind.startswith('bfloat16') and cast.blocks.get_value().dtype == jnp.bfloat16
  got = weight.contract('BTD,DF->BTF', x)
  assert got.dtype == jnp.bfloat16 and weight.contract('BTD,DF->BTF', x, jnp.float32).dtype == jnp.float32
  np.testing.assert_array_equal(cast.contract('BTD,DF->BTF', x), got)


def test_on_a_mesh_blocks_are_replicated_and_rows_are_cut(mesh):
  weight, _ = sparse('DF', 'D')
  x = jnp.asarray(np.random.default_rng(0).normal(size=(8, 3, 64)), jnp.float32)
  loss = lambda weight, x: jnp.sum(weight.contract('BTD,DF->BTF', x) ** 2)
  both = jax.jit(jax.value_and_grad(loss, argnums=1))
  wanted = both(weight, x)
  with mesh(2, 2, 1, 2): found = both(weight, x)
  for ours, theirs in zip(found, wanted, strict=True): np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize('axes, block, message', [
  ('DF', (48, 4), 'blocks of 48 inputs by 4 outputs do not divide its 64 x 32'),
  ('DF', (8, 5), 'blocks of 8 inputs by 5 outputs do not divide its 64 x 32'), ('EDF', BLOCK, 'is stacked by expert')])
def test_what_has_no_such_blocks_is_refused_in_one_line(axes, block, message):
  with pytest.raises(IncompatibleError, match=message) as caught: grid(Dense(draw(axes), axes, 'D'), block)
  assert '\n' not in str(caught.value)


def test_experts_have_no_blocks():
  weight, _ = sparse('DF', 'D')
  with pytest.raises(IncompatibleError, match='is stacked by expert'):
    BlockSparse(weight.blocks.get_value(), weight.rows.get_value(), 8, Layout('EDF', 'D'))
