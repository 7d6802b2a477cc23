"""Masked weights without their zeros: of N:M patterns the kept numbers and their places, of others a bit for each entry and
the numbers in a row. They materialize to what they were made of, bit for bit.

This saves bytes, on disk and in memory, and no time: a product unpacks the array first.
"""
import functools

import jax
import jax.numpy as jnp
from flax import nnx

from efficient_lm.ops import packing
from efficient_lm.weights.invariants import Pattern
from efficient_lm.weights.layout import Layout, matrix_shape
from efficient_lm.weights.masked import Masked
from efficient_lm.weights.weight import Dense, Frozen, OutputsFirst

MOST = 16   # m of the patterns whose places are stored, in 2 bits up to 4 and in 4 up to this


class PackedMasked(Masked):
  """A Masked Dense; `inner` and `keep` are made when they are asked for. Training moves what is kept.

  values: (..., O, I * n / m) of an N:M pattern, else (..., K), zeros at the end where a matrix keeps fewer than another.
  places: uint8 (..., O, bytes), of N:M the place of each value in its group, else a bit for each entry."""

  def __init__(self, values, places, layout: Layout, num_inputs: int, pattern: Pattern | None = None, of_pattern=False):
    self.layout, self.num_inputs, self.pattern, self.of_pattern = layout, num_inputs, pattern, of_pattern
    rows = layout.experts + layout.letters[-2] + '1'
    self.values = nnx.Param(values, axes=rows if of_pattern else layout.experts + '1')
    self.places = Frozen(places, axes=rows)

  @property
  def axes(self): return self.layout.axes

  @property
  def inputs(self): return self.layout.inputs

  @property
  def kind(self): return f'Dense, masked{f" {self.pattern}" if self.pattern else ""}, packed'

  @property
  def product(self): return 'float, unpacked first'

  @property
  def pruned(self): return False

  @property
  def shape(self): return self.layout.array_shape((*self.places.get_value().shape[:-1], self.num_inputs))

  @property
  def inner(self): return Dense(self.materialize(), self.layout.axes, self.layout.inputs)

  @property
  def keep(self): return Frozen(_mask(self), axes=self.layout.axes)

  def materialize(self): return _unpacked(self)

  def cast(self, dtype): return self

  def cleaned(self): return self

  def for_decoding(self):
    return self if self.axes[0] in 'VT' else jax.jit(OutputsFirst)(self)

  def slots(self, x):
    """(..., O, slots) -> (..., O, groups, n)."""
    return x.reshape(*x.shape[:-1], self.num_inputs // self.pattern.m, self.pattern.n)

  def at(self):
    """bool (..., O, groups, n, m): where in its group each value stands."""
    bits, count = place_bits(self.pattern.m), self.num_inputs // self.pattern.m * self.pattern.n
    place = packing.unpack(self.places.get_value(), bits)[..., :count] & (2 ** bits - 1)   # codes are signed
    return self.slots(place)[..., None] == jnp.arange(self.pattern.m)

  def kept(self):
    """bool (..., O, I)."""
    places = self.places.get_value()
    if self.of_pattern: return jnp.any(self.at(), -2).reshape(*places.shape[:-1], self.num_inputs)
    return jnp.unpackbits(places, axis=-1, count=self.num_inputs).astype(bool)


@jax.jit
def _mask(weight: PackedMasked): return weight.layout.array(weight.kept())


@jax.jit
def _unpacked(weight: PackedMasked):
  values, keep_OI = weight.values.get_value(), weight.kept()
  if weight.of_pattern:
    array = jnp.sum(jnp.where(weight.at(), weight.slots(values)[..., None], 0), -2)
    return weight.layout.array(array.reshape(keep_OI.shape))
  flat = keep_OI.reshape(*keep_OI.shape[:-2], -1)
  if not values.shape[-1]: return weight.layout.array(jnp.zeros(keep_OI.shape, values.dtype))
  place = jnp.maximum(jnp.cumsum(flat, -1, dtype=jnp.int32) - 1, 0)
  array = jnp.where(flat, jnp.take_along_axis(values, place, -1), jnp.zeros((), values.dtype))
  return weight.layout.array(array.reshape(keep_OI.shape))


def place_bits(m: int) -> int:
  """Bits of a place in a group of m."""
  return 2 if m <= 4 else 4


def packed(weight: Masked) -> PackedMasked:
  """A Masked Dense without its zeros; itself if it is that already."""
  if isinstance(weight, PackedMasked): return weight
  layout, pattern = Layout.of(weight), weight.pattern
  keep_OI, matrix_OI = layout.matrix(weight.keep.get_value()), layout.matrix(weight.materialize())
  if pattern is not None and pattern.m <= MOST:
    per_group = jnp.sum(keep_OI.reshape(*keep_OI.shape[:-1], -1, pattern.m), -1)
    if bool(jnp.all(per_group == pattern.n)): return _of_pattern(matrix_OI, keep_OI, layout, pattern)
  num_kept = jnp.sum(keep_OI, (-2, -1))
  values, places = _in_a_row(matrix_OI, keep_OI, int(jnp.max(num_kept)))
  return PackedMasked(values, places, layout, matrix_shape(weight)[1], pattern)


def _of_pattern(matrix_OI, keep_OI, layout, pattern):
  values, places = _by_places(matrix_OI, keep_OI, n=pattern.n, m=pattern.m)
  return PackedMasked(values, places, layout, matrix_OI.shape[-1], pattern, True)


@functools.partial(jax.jit, static_argnames=('n', 'm'))
def _by_places(matrix_OI, keep_OI, *, n: int, m: int):
  """The kept numbers (..., O, I * n / m), and the place in its group of each, in few bits."""
  groups = lambda x_OI: x_OI.reshape(*x_OI.shape[:-1], -1, m)
  place = jnp.argsort(~groups(keep_OI), -1, stable=True)[..., :n]
  values = jnp.take_along_axis(groups(matrix_OI), place, -1)
  rows = lambda x: x.reshape(*x.shape[:-2], -1)
  codes = rows(place).astype(jnp.uint8)
  short = -codes.shape[-1] % packing.codes_in_whole_bytes(place_bits(m))
  codes = jnp.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, short)])
  return rows(values), packing.pack(codes, place_bits(m))


@functools.partial(jax.jit, static_argnames='num_kept')
def _in_a_row(matrix_OI, keep_OI, num_kept: int):
  """The kept numbers of each matrix (..., K), and its mask as bits."""
  lead = matrix_OI.shape[:-2]
  flat, keep = matrix_OI.reshape(*lead, -1), keep_OI.reshape(*lead, -1)

  def one(row, keep):
    place = jnp.where(keep, jnp.cumsum(keep, dtype=jnp.int32) - 1, num_kept)
    return jnp.zeros(num_kept, row.dtype).at[place].set(row, mode='drop')
  for _ in lead: one = jax.vmap(one)
  return one(flat, keep), jnp.packbits(keep_OI, axis=-1)
