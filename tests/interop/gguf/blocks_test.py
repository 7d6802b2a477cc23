"""Blocks of each kind stand for exactly the numbers that the package gguf 0.19.0 gives: fixtures/make.py."""
import pathlib

import ml_dtypes
import numpy as np
import pytest

from efficient_lm.interop.gguf import blocks

FIXTURE = np.load(pathlib.Path(__file__).parent / 'fixtures' / 'blocks.npz')
QUANTIZED = sorted(blocks.RECORDS)


def assert_same_bits(a, b):
  np.testing.assert_array_equal(np.asarray(a).view(np.uint32), np.asarray(b).view(np.uint32))


@pytest.mark.parametrize('kind', QUANTIZED)
def test_blocks_are_dequantized_bit_for_bit(kind):
  raw, numbers = FIXTURE[f'{kind}_raw'], FIXTURE[f'{kind}_numbers']
  assert (blocks.layout(kind)) == (numbers.shape[1], raw.shape[1])
  assert_same_bits(blocks.decode(raw.reshape(-1), kind), numbers.reshape(-1))


@pytest.mark.parametrize('kind', QUANTIZED)
def test_a_block_does_not_depend_on_its_neighbours_or_its_address(kind, monkeypatch):
  raw = np.concatenate([FIXTURE[f'{kind}_raw']] * 5)
  whole = blocks.decode(raw.reshape(-1), kind)
  monkeypatch.setattr(blocks, 'AT_ONCE', 1024)   # two to seven pieces
  moved = np.frombuffer(b'?' + raw.tobytes(), np.uint8)[1:]
  assert_same_bits(blocks.decode(moved, kind), whole)
  for i, block in enumerate(raw): assert_same_bits(blocks.decode(block, kind), whole.reshape(len(raw), -1)[i])


def test_scales_of_mxfp4_reach_from_subnormal_to_the_largest():
  """The code 2 is 1.0: a block of exponent e holds 2 ** (e - 127)."""
  exponents = np.arange(255)
  raw = np.concatenate([np.uint8(exponents)[:, None], np.full((255, 16), 0x22, np.uint8)], 1)
  numbers = blocks.decode(raw.reshape(-1), 'MXFP4').reshape(255, 32)
  np.testing.assert_array_equal(numbers, np.broadcast_to(np.ldexp(np.float32(1), exponents - 127)[:, None], (255, 32)))


@pytest.mark.parametrize('kind, dtype', [('F32', np.float32), ('F16', np.float16), ('BF16', ml_dtypes.bfloat16)])
def test_plain_numbers_are_a_view_in_their_own_dtype(kind, dtype):
  numbers = np.array([0, -1.5, 3e4, np.inf], dtype)
  raw = numbers.view(np.uint8)
  found = blocks.decode(raw, kind)
  assert found.dtype == dtype == blocks.dtype(kind) and np.shares_memory(found, raw)
  np.testing.assert_array_equal(found, numbers)


def test_a_scale_that_is_not_finite_makes_numbers_that_are_not_and_no_noise(recwarn):
  raw = FIXTURE['Q4_0_raw'].copy()
  raw[:, :2] = np.array([np.nan], np.float16).view(np.uint8)
  assert np.isnan(blocks.decode(raw.reshape(-1), 'Q4_0')).all()
  assert not recwarn.list
