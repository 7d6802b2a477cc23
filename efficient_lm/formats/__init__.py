"""Number formats: what a weight or an activation is rounded to, and how it is stored.

A format is a grid of numbers and the granularity of the scales that stretch it over a matrix (N, K), outputs first:

  w_NK = (number(code_NK) - zero) * scale

with one scale, and perhaps one zero point, for each of the tiles that `scales` cuts the matrix into. A format knows three
things (`format.Format`): how to fit scales to a tile's extremes, which code is nearest, and what a code is worth. All else
follows, for every format alike: rounding while training, packing, error, bytes.
"""
from efficient_lm.formats.floating import MXFP4, MXFP8, NF4, NVFP4, Float8
from efficient_lm.formats.format import Encoded, Format
from efficient_lm.formats.granularity import Block, Channel, Group, Tensor
from efficient_lm.formats.integer import Int, MidRise, Ternary
from efficient_lm.formats.ranges import AbsMax, AbsMean, MeanSquaredError, Percentile

__all__ = ['MXFP4', 'MXFP8', 'NF4', 'NVFP4', 'AbsMax', 'AbsMean', 'Block', 'Channel', 'Encoded', 'Float8', 'Format', 'Group',
           'Int', 'MeanSquaredError', 'MidRise', 'Percentile', 'Tensor', 'Ternary']
