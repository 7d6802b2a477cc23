"""Blocks of GGUF as matrices in the formats of this library, number for number: nothing is dequantized on the way.

Q4_0 has codes from -8, and scales of either sign, where a grid that is fitted here has -7 to 7 and positive ones: what is
read is never fitted again. A block of Q4_1 whose scale is 0 holds one number, for which other codes stand here. A zero with
a minus, which MXFP4 has, is a zero with a minus here and a plain one in engines; its numbers below 2^-126 are zero where XLA
computes them.

Alphabet: O outputs, n blocks of a row, C numbers of a block.
"""
import numpy as np

from efficient_lm.formats import MXFP4, Affine, Encoded, Group, Int
from efficient_lm.formats.format import Scales
from efficient_lm.interop.gguf import blocks

_GROUP = Group(size=32)
FORMATS = {'Q8_0': Int(bits=8, scales=_GROUP, scale_dtype='float16'),
           'Q4_0': Int(bits=4, scales=_GROUP, scale_dtype='float16'), 'Q4_1': Affine(scales=_GROUP), 'MXFP4': MXFP4()}


def encoded(raw_OB: np.ndarray, kind: str) -> Encoded:
  """A matrix of the format FORMATS[kind] from the bytes of its rows: values (O, I) or, of 4 bits, (O, I / 2); scales (n, O),
  float16 or the exponents of MXFP4, and the least numbers of Q4_1 beside them."""
  made = np.ascontiguousarray(raw_OB).view(blocks.RECORDS[kind][1])   # (O, n)
  if kind == 'Q8_0': return Encoded(made['q'].reshape(len(made), -1), Scales(made['d'].T))
  low = made['low']   # (O, n, 16): the first half of a block in low bits, the second in high ones
  codes_OnC = np.concatenate([low & 15, low >> 4], -1)
  if kind != 'MXFP4': codes_OnC = codes_OnC ^ 8   # 0 … 15 that stand for -8 … 7, in two's complement
  scale_On, low_On = made['exponent' if kind == 'MXFP4' else 'd'], None
  if kind == 'Q4_1':
    low_On, flat_On = made['m'], scale_On == 0
    codes_OnC = np.where(flat_On[..., None], np.uint8(8), codes_OnC)   # -8, the lowest level
    scale_On = np.where(flat_On, np.where(low_On == 0, 1, low_On), scale_On).astype(np.float16)
  codes_OI = codes_OnC.reshape(len(made), -1)
  scales = Scales(scale_On.T, None if low_On is None else low_On.T)
  return Encoded(codes_OI[:, ::2] | codes_OI[:, 1::2] << np.uint8(4), scales)
