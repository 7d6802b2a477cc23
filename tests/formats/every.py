"""One format of each kind that rounds differently, for the tests of formats and of quantized weights."""
from efficient_lm.formats import (
  MXFP4,
  MXFP8,
  NF4,
  NVFP4,
  Affine,
  Block,
  Float8,
  FullRangeInt,
  Group,
  Int,
  MidRise,
  Tensor,
  Ternary,
)

FORMATS = [
  Int(), Int(scales=Tensor()), Int(bits=4, scales=Group(size=32)), Int(bits=4, symmetric=False),
  Int(bits=3, scales=Group(size=64)), Int(bits=2), Int(bits=2, symmetric=False, scales=Group(size=32)),
  FullRangeInt(scales=Group(size=32)), FullRangeInt(bits=3), Affine(), Affine(bits=2, scales=Group(size=16)),
  MidRise(), MidRise(bits=3), Ternary(),
  Float8(), Float8(variant='e5m2'), Float8(scales=Block(outputs=8, inputs=32)), NF4(), MXFP8(), MXFP4(), NVFP4(),
]
NAMES = [format.name for format in FORMATS]
