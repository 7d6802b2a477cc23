"""Packing loses nothing, fills whole bytes, and lays codes into the bytes that its definition names."""
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from efficient_lm.ops.packing import (
  as_int4,
  codes_in_whole_bytes,
  pack,
  pack_halves,
  planes,
  unpack,
  unpack_halves,
  wide_planes,
)

BITS = [2, 3, 4]


def codes_of(bits: int, *shape: int, seed=0) -> np.ndarray:
  return np.random.default_rng(seed).integers(-2 ** (bits - 1), 2 ** (bits - 1), shape).astype(np.int8)


def defined(row, bits: int) -> list[int]:
  """The bytes of one row by definition: its codes are the digits of one number, the first the lowest, in the base 2^bits."""
  number = sum((int(code) & (2 ** bits - 1)) << (bits * i) for i, code in enumerate(row))
  return list(number.to_bytes(len(row) * bits // 8, 'little'))


@settings(deadline=None, max_examples=30)
@given(st.sampled_from(BITS), st.integers(0, 2 ** 16), st.integers(1, 5))
def test_bytes_are_those_of_the_definition_and_unpack_to_what_was_packed(bits, seed, octets):
  codes = codes_of(bits, 2, 3, 8 * octets, seed=seed)
  packed = pack(codes, bits)
  assert packed.dtype == np.uint8 and packed.shape == (2, 3, bits * octets)
  assert np.asarray(packed).reshape(6, -1).tolist() == [defined(row, bits) for row in codes.reshape(6, -1)]
  np.testing.assert_array_equal(unpack(packed, bits), codes)


@pytest.mark.parametrize('bits', BITS)
def test_every_byte_is_the_packing_of_what_it_unpacks_to(bits):
  every = np.arange(256, dtype=np.uint8)[:, None] if bits != 3 else codes_of(8, 99, 3).view(np.uint8)
  np.testing.assert_array_equal(pack(unpack(every, bits), bits), every)


def test_eight_bits_are_bytes_already():
  codes = np.arange(-8, 8, dtype=np.int8)
  assert pack(codes, 8) is codes and unpack(codes, 8) is codes and planes(codes, 8)[0] is codes is wide_planes(codes, 8)[0]


@pytest.mark.parametrize('bits', [2, 4])
def test_a_plane_holds_every_so_many_th_code(bits):
  codes, count = codes_of(bits, 3, 16), 8 // bits
  packed = pack(codes, bits)
  for p, (plane, wide) in enumerate(zip(planes(packed, bits), wide_planes(packed, bits), strict=True)):
    assert plane.dtype == np.int8 and wide.dtype == np.int32
    np.testing.assert_array_equal(plane, codes[:, p::count])
    np.testing.assert_array_equal(wide, codes[:, p::count])


def test_four_bits_are_jax_int4():
  """The same bytes in the same order, so that a device may read them as such."""
  codes = np.arange(-8, 8, dtype=np.int8).reshape(2, 8)
  np.testing.assert_array_equal(as_int4(pack(codes, 4)).astype(jnp.int8), codes)


def test_halves_of_every_pair_of_codes_share_a_byte():
  """The code of the first half in the low bits, that of the second in the high ones; the planes are the halves."""
  pairs = np.array(list(itertools.product(range(-8, 8), repeat=2)), np.int8)
  packed = pack_halves(jnp.asarray(pairs))
  assert packed.dtype == np.uint8
  assert packed[:, 0].tolist() == [(low & 15) | (high & 15) << 4 for low, high in pairs.tolist()]
  np.testing.assert_array_equal(unpack_halves(packed), pairs)
  assert pack_halves(jnp.array([1, 2, -1, 3], jnp.int8)).tolist() == [0xf1, 0x32]
  np.testing.assert_array_equal(jnp.concatenate(planes(packed, 4), -1), pairs)


@pytest.mark.parametrize('bits, multiple', [(4, 2), (3, 8), (2, 4)])
def test_codes_that_leave_a_byte_unfilled_are_refused(bits, multiple):
  assert codes_in_whole_bytes(bits) == multiple
  with pytest.raises(ValueError, match=f'multiple of {multiple}'): jax.eval_shape(
    lambda codes: pack(codes, bits), jax.ShapeDtypeStruct((2, multiple + 1), jnp.int8))
