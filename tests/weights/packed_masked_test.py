"""Packed masked weights are what they were made of, bit for bit, in fewer bytes; what holds of a mask holds of them."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_lm.compression import pruning
from efficient_lm.compression.patterns import Blocks, NofM, PerMatrix, PerOutput
from efficient_lm.compression.scores import Magnitude
from efficient_lm.tree import num_bytes
from efficient_lm.weights.invariants import Pattern
from efficient_lm.weights.masked import Masked
from efficient_lm.weights.packed_masked import PackedMasked, packed
from efficient_lm.weights.weight import Dense

LETTERS = {'DF': ('D', (2, 16, 6)), 'NHD': ('NH', (2, 8, 5)), 'EFD': ('F', (2, 3, 8, 5))}
PATTERNS = [PerMatrix(), PerOutput(), NofM(), NofM(n=1, m=4), NofM(n=3, m=8), Blocks(outputs=1, inputs=2)]
pytestmark = pytest.mark.usefixtures('quick_compilation')


def masked(axes, inputs, shape, pattern, share=0.5, dtype=jnp.float32):
  array = jnp.asarray(np.random.default_rng(0).normal(size=shape), dtype)
  return pruning.masked(Dense(array, axes, inputs), {}, pattern.share(share), score=Magnitude(), pattern=pattern)


@pytest.mark.parametrize('pattern, axes, dtype', [
  *((pattern, 'EFD', jnp.float32) for pattern in PATTERNS), (PerMatrix(), 'NHD', jnp.bfloat16),
  (NofM(), 'NHD', jnp.bfloat16), (NofM(), 'DF', jnp.float32)], ids=str)
def test_what_is_packed_is_the_same_weight(pattern, axes, dtype):
  weight = masked(axes, *LETTERS[axes], pattern, dtype=dtype)
  small = packed(weight)
  assert isinstance(small, PackedMasked) and small.materialize().dtype == dtype
  np.testing.assert_array_equal(small.materialize(), weight.materialize())
  np.testing.assert_array_equal(small.keep.get_value(), weight.keep.get_value())
  assert (small.axes, small.inputs, small.shape, small.pattern) == (weight.axes, weight.inputs, weight.shape, weight.pattern)
  assert all(one.held_by(small) for one in weight.invariants())
  assert [one.kind for one in small.invariants()] == [one.kind for one in weight.invariants()]
  assert num_bytes(small) < num_bytes(weight.inner) < num_bytes(weight)


@pytest.mark.parametrize('pattern, bits', [(NofM(), 2 * 32 + 2 * 2), (PerMatrix(), 2 * 32 + 4)], ids=str)
def test_four_numbers_take_as_many_bits_as_is_said(pattern, bits):
  """Two of four in float32: two numbers, and two bits for the place of each, or four bits of a mask."""
  assert num_bytes(packed(masked('DF', 'D', (64, 32), pattern))) * 8 == 64 * 32 // 4 * bits


def test_matrices_that_keep_other_numbers_of_entries_share_an_array():
  keep = jnp.arange(3)[:, None, None] * 10 > jnp.arange(24).reshape(1, 4, 6)   # none, 10 and 20 of 24
  weight = Masked(Dense(jnp.ones((3, 4, 6)), 'DF', 'D'), keep).cleaned()
  np.testing.assert_array_equal(packed(weight).materialize(), weight.materialize())
  np.testing.assert_array_equal(packed(weight).keep.get_value(), keep)
  nothing = Masked(Dense(jnp.ones((4, 6)), 'DF', 'D'), jnp.zeros((4, 6), bool)).cleaned()
  assert not np.any(packed(nothing).materialize())


def test_of_a_pattern_that_keeps_fewer_the_mask_is_stored():
  """What another mask has taken beside it would otherwise be free to move."""
  keep = jnp.arange(8)[:, None] % 4 < 1
  weight = Masked(Dense(jnp.ones((8, 3)), 'DF', 'D'), jnp.broadcast_to(keep, (8, 3)), Pattern(2, 4)).cleaned()
  small = packed(weight)
  assert not small.of_pattern and small.pattern == Pattern(2, 4)
  np.testing.assert_array_equal(small.keep.get_value(), weight.keep.get_value())


@pytest.mark.parametrize('pattern', [PerMatrix(), NofM()], ids=str)
def test_it_multiplies_and_learns_as_the_masked_weight(pattern):
  weight = masked('DF', 'D', (16, 6), pattern)
  x_BTD = jnp.asarray(np.random.default_rng(1).normal(size=(2, 3, 16)), jnp.float32)
  loss = lambda weight: jnp.sum(jnp.square(weight.contract('BTD,DF->BTF', x_BTD)))
  np.testing.assert_array_equal(loss(packed(weight)), loss(weight))
  gradient = jax.grad(lambda values: loss(replaced(packed(weight), values)))(packed(weight).values.get_value())
  expected = jax.grad(lambda array: loss(Masked(Dense(array, 'DF', 'D'), weight.keep)))(weight.materialize())
  moved = replaced(packed(weight), packed(weight).values.get_value() - gradient)
  np.testing.assert_allclose(moved.materialize(), weight.materialize() - expected, rtol=1e-5, atol=1e-5)
  assert all(one.held_by(moved) for one in weight.invariants())


def replaced(weight, values):
  return PackedMasked(values, weight.places.get_value(), weight.layout, weight.num_inputs, weight.pattern, weight.of_pattern)


def test_what_changes_the_numbers_leaves_a_masked_weight():
  small = packed(masked('DF', 'D', (16, 6), NofM()))
  twice = small.around(lambda inner: inner.replaced(inner.materialize() * 2))
  assert type(twice) is Masked and twice.pattern == Pattern(2, 4)
  np.testing.assert_array_equal(twice.materialize(), small.materialize() * 2)
  np.testing.assert_array_equal(small.for_decoding().materialize(), small.materialize())
  assert packed(small) is small
