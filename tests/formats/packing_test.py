"""Packing loses nothing and fills whole bytes."""
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from efficient_lm.formats.packing import pack, unpack
from efficient_lm.ops.quantized_matmul import pack_int2, pack_int4


@settings(deadline=None, max_examples=30)
@given(st.sampled_from([2, 3, 4]), st.integers(0, 2 ** 16), st.integers(1, 5))
def test_what_is_unpacked_is_what_was_packed(bits, seed, octets):
  codes = np.random.default_rng(seed).integers(-2 ** (bits - 1), 2 ** (bits - 1), (2, 3, 8 * octets)).astype(np.int8)
  packed = pack(codes, bits)
  assert packed.dtype == np.uint8 and packed.shape == (2, 3, bits * octets)
  np.testing.assert_array_equal(unpack(packed, bits), codes)


def test_eight_bits_are_bytes_already():
  codes = np.arange(-8, 8, dtype=np.int8)
  assert pack(codes, 8) is codes and unpack(codes, 8) is codes


@pytest.mark.parametrize('bits, op', [(4, pack_int4), (2, pack_int2)])
def test_codes_lie_as_the_product_reads_them(bits, op):
  codes = np.random.default_rng(0).integers(-2 ** (bits - 1), 2 ** (bits - 1), (3, 16)).astype(np.int8)
  np.testing.assert_array_equal(pack(codes, bits), op(codes))


@pytest.mark.parametrize('bits, multiple', [(4, 2), (3, 8), (2, 4)])
def test_codes_that_leave_a_byte_unfilled_are_refused(bits, multiple):
  with pytest.raises(ValueError, match=f'multiple of {multiple}'): pack(np.zeros((2, multiple + 1), np.int8), bits)
