"""Matrices that stay as they are stored hold the numbers that engines dequantize them to, bit for bit."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from efficient_lm.interop.gguf import blocks, unpacking
from efficient_lm.weights.layout import Layout
from efficient_lm.weights.quantized import Quantized


def drawn(kind: str, rows: int, count: int, seed: int) -> np.ndarray:
  """Blocks of any codes, with finite scales of either sign: uint8 (rows, bytes)."""
  rng = np.random.default_rng(seed)
  record = blocks.RECORDS[kind][1]
  made = rng.integers(0, 256, (rows, count, record.itemsize), np.uint8).view(record)[..., 0]
  if kind == 'MXFP4': made['exponent'] = rng.integers(2, 252, made.shape)   # all numbers are normal
  else: made['d'] = (rng.normal(size=made.shape) * np.exp(rng.uniform(-6, 6, made.shape))).astype(np.float16)
  if kind == 'Q4_1':
    made['m'] = rng.normal(size=made.shape).astype(np.float16)
    made['d'][0, :2], made['m'][0, 1] = 0, 0   # one number, and none
  return made.view(np.uint8).reshape(rows, -1)


@pytest.mark.parametrize('kind', sorted(unpacking.FORMATS))
@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 2 ** 32 - 1))
def test_numbers_are_those_of_the_blocks(kind, seed):
  """Of Q4_0 also -8, which no grid that is fitted here has; of Q4_1 also where all numbers of a block are the same."""
  raw, format = drawn(kind, 6, 4, seed), unpacking.FORMATS[kind]
  encoded = unpacking.encoded(raw, kind)
  found = format.decode(encoded)
  np.testing.assert_array_equal(found, blocks.decode(raw.reshape(-1), kind).reshape(6, 128))
  assert sum(leaf.nbytes for leaf in jax.tree.leaves(encoded)) == raw.nbytes


@pytest.mark.parametrize('kind', ['Q4_0', 'Q4_1'])
def test_products_read_codes_that_no_grid_has_and_scales_of_either_sign(kind):
  """Up to the order of sums of 128 float32 numbers; as stored, and as decoding reads them."""
  raw = drawn(kind, 8, 4, 0)
  wanted = blocks.decode(raw.reshape(-1), kind).reshape(8, 128)
  encoded = unpacking.encoded(raw, kind)
  weight = Quantized(encoded._replace(values=jnp.asarray(encoded.values)), unpacking.FORMATS[kind], Layout('DF', 'D'))
  x = np.random.default_rng(1).normal(size=(2, 3, 128)).astype(np.float32)
  bound = 2. ** -23 * 128 * np.einsum('BTD,FD->BTF', np.abs(x), np.abs(wanted)).max()
  for one in (weight, weight.for_decoding()):
    np.testing.assert_allclose(one.contract('BTD,DF->BTF', x), np.einsum('BTD,FD->BTF', x, wanted), rtol=0, atol=bound)
