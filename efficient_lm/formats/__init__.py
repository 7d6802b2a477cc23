"""Number formats: what a weight or an activation is rounded to, and how it is stored.

A format is a grid of numbers and the granularity of the scales that stretch it over a matrix (O, I), its outputs first:

  w_OI = (number(code_OI) - zero) * scale

with one scale, and perhaps one zero point, for each of the tiles that `scales` cuts the matrix into. A format defines three
things (`format.Format`): how scales are fitted to a tile's extremes, which code is nearest to a number, and which number a
code stands for. Fake quantization, packing, errors and bytes follow from these in the same way for every format.
"""
from efficient_lm.formats.floating import MXFP4, MXFP8, NF4, NVFP4, Float8
from efficient_lm.formats.format import Encoded, Format
from efficient_lm.formats.granularity import Block, Channel, Group, Tensor
from efficient_lm.formats.integer import Affine, FullRangeInt, Int, MidRise, Ternary
from efficient_lm.formats.ranges import AbsMax, AbsMean, MeanSquaredError, Percentile

__all__ = ['MXFP4', 'MXFP8', 'NF4', 'NVFP4', 'AbsMax', 'AbsMean', 'Affine', 'Block', 'Channel', 'Encoded', 'Float8',
           'Format', 'FullRangeInt', 'Group', 'Int', 'MeanSquaredError', 'MidRise', 'Percentile', 'Tensor', 'Ternary']
