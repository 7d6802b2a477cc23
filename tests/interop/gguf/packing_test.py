"""Blocks hold the numbers of a matrix bit for bit, whatever they are; where they cannot, what moved is said."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from efficient_lm.compression import solver
from efficient_lm.formats import MXFP4, NF4, NVFP4, Affine, Channel, Float8, Group, Int, Tensor, Ternary
from efficient_lm.interop.gguf import blocks, packing
from efficient_lm.interop.written import Stored
from tests.interop.gguf.checkpoints import E2M1, in_few_bits

HALF = dict(scale_dtype='float16')
EXACT = {   # least and largest code, inputs that share a scale, the format
  'Q4_0': (-8, 7, 64, Int(bits=4, scales=Group(size=64), **HALF)), 'Q8_0': (-128, 127, 96, Int(scales=Channel(), **HALF)),
  'Q4_1': (-8, 7, 32, Int(bits=4, symmetric=False, scales=Group(size=32), **HALF)),
  'TQ1_0': (-1, 1, 512, Ternary(scales=Tensor(), **HALF)),
  'TQ2_0': (-1, 1, 256, Int(bits=2, scales=Group(size=256), **HALF)),
  'MXFP4': (-8, 7, 32, MXFP4())}
OF_EACH = [(Int(scales=Group(size=64), **HALF), 'Q8_0'), (Int(bits=4, **HALF), 'Q4_0'), (Int(bits=2, **HALF), 'TQ2_0'),
           (Ternary(**HALF), 'TQ2_0'), (MXFP4(), 'MXFP4'), (Affine(), 'Q4_1')]


def decoded(stored: Stored, kind: str) -> np.ndarray:
  return blocks.decode(packing.pack(stored, kind).reshape(-1), kind).reshape(stored.shape)


@pytest.mark.parametrize('kind', EXACT)
@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 2 ** 32 - 1), rows=st.integers(1, 5), groups=st.integers(1, 3))
def test_blocks_stand_for_the_very_numbers_of_a_matrix(kind, seed, rows, groups):
  """Of any codes and any scales in float16, of either sign. Zeros may lose their sign."""
  least, most, size, format = EXACT[kind]
  rng = np.random.default_rng(seed)
  numbers = rng.integers(least, most + 1, (rows, groups * size)).astype(np.int8)
  step = (rng.normal(size=(rows, groups)) * np.exp(rng.uniform(-8, 8, (rows, groups)))).astype(np.float16).astype(np.float32)
  step[step == 0] = 1
  zero = None
  if kind == 'MXFP4':
    numbers, step = E2M1[numbers + 8], np.ldexp(np.float32(1), rng.integers(-126, 120, (rows, groups)))
  if kind == 'Q4_1':   # 7 bits of a scale and 4 of a code less zero fit in the 11 of a float16
    step = (rng.integers(64, 128, (rows, groups)) * 2. ** rng.integers(-12, 3, (rows, groups))).astype(np.float32)
    zero = rng.integers(-8, 8, (rows, groups)).astype(np.float32)
  stored = Stored(numbers, step, zero, format)
  assert packing.kind_of(stored, kind if kind.startswith('T') else 'TQ2_0') == kind and packing.moved(stored, kind) == 0
  np.testing.assert_array_equal(decoded(stored, kind), stored.dequantized())


@pytest.mark.parametrize('format, kind', OF_EACH, ids=lambda one: getattr(one, 'name', one))
def test_what_a_format_rounds_to_is_what_the_file_holds(format, kind):
  stored = in_few_bits(np.random.default_rng(0).normal(size=(8, 512)), format)
  assert packing.kind_of(stored) == kind and packing.moved(stored, kind) == 0
  np.testing.assert_array_equal(decoded(stored, kind), stored.dequantized())


def test_what_gptq_has_chosen_survives():
  """Which rounding to nearest anew would undo: it is not what is nearest to the weights."""
  rng, format = np.random.default_rng(0), Int(bits=4, scales=Group(size=32), **HALF)
  w_OI, x_MI = (rng.normal(size=shape).astype(np.float32) for shape in ((8, 64), (256, 64)))
  x_MI[:, 1:] += x_MI[:, :-1]
  gptq = jax.jit(functools.partial(solver.gptq, format=format), compiler_options={'xla_backend_optimization_level': 0})
  encoded = gptq(jnp.asarray(w_OI), jnp.asarray(x_MI.T @ x_MI))
  chosen = in_few_bits(w_OI, format, encoded)
  assert (chosen.numbers_OI != in_few_bits(w_OI, format).numbers_OI).mean() > 0.1
  np.testing.assert_array_equal(decoded(chosen, 'Q4_0'), format.decode(encoded))


@pytest.mark.parametrize('format', [Int(bits=4), Int(), Int(bits=4, symmetric=False, scales=Group(size=32))],
                         ids=lambda format: format.name)
def test_scales_of_32_bits_are_rounded_and_by_how_much_is_said(format):
  """Codes stay: they are what was chosen. The nearest float16 is within 2^-11; an offset of up to 23 scales within
  23 * 2^-11 of one, and a scale times up to 15 moves as well."""
  stored = in_few_bits(np.random.default_rng(0).normal(size=(8, 512)), format)
  kind = packing.kind_of(stored)
  moved, wanted = decoded(stored, kind), stored.dequantized()
  size = np.abs(wanted) if kind != 'Q4_1' else np.repeat(stored.step_OQ, packing.group(stored), 1)
  said = packing.moved(stored, kind)
  assert 0 < said < 2. ** -11 * (1 if kind != 'Q4_1' else 38)
  # What is measured is computed in float32, whose roundings are 2^-24 of numbers up to 15 steps.
  assert said * .5 < np.max(np.abs(moved - wanted) / np.where(size == 0, 1, size)) < said + 2. ** -19


@pytest.mark.parametrize('format, words', [
  (Int(bits=3), 'no block'), (NF4(), 'no block'), (NVFP4(), 'no block'), (Float8(), 'no block'),
  (Int(symmetric=False), 'no block'),
  (Int(bits=4, scales=Group(size=16)), 'do not fill blocks of 32'), (Ternary(scales=Group(size=128)), 'blocks of 256')],
  ids=lambda one: getattr(one, 'name', one))
def test_what_has_no_block_is_known_and_a_fix_named(format, words):
  stored = in_few_bits(np.random.default_rng(0).normal(size=(8, 256)), format)
  assert packing.kind_of(stored) is None and words in packing.fix(stored)


def test_a_scale_that_float16_cannot_hold_is_refused():
  stored = Stored(np.ones((1, 32), np.int8), np.full((1, 1), 1e6, np.float32), None, Int())
  with pytest.raises(ValueError, match='65504'): packing.moved(stored, 'Q8_0')


@pytest.mark.parametrize('kind', EXACT)
def test_the_package_gguf_reads_the_same_numbers(kind):
  """Bit for bit, of all codes: but for a zero with a minus, which MXFP4 has and the package as well reads as 0."""
  quants = pytest.importorskip('gguf.quants', reason='the package gguf is not installed: pip install gguf')
  from gguf import GGMLQuantizationType
  least, most, size, format = EXACT[kind]
  codes = np.resize(np.arange(least, most + 1), (4, 3 * size)).astype(np.int8)
  step = (np.arange(1, 13, dtype=np.float32) / 64).reshape(4, 3)
  zero = np.resize(np.arange(-8., 8., dtype=np.float32), (4, 3)) if kind == 'Q4_1' else None
  numbers, step = (E2M1[codes + 8], np.exp2(np.round(np.log2(step)))) if kind == 'MXFP4' else (codes, step)
  stored = Stored(numbers, step, zero, format)
  found = quants.dequantize(packing.pack(stored, kind), GGMLQuantizationType[kind])
  np.testing.assert_array_equal(found, stored.dequantized())
