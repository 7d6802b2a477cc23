"""Adam's moments in eight bits: 2.03 bytes a parameter in place of 8.

Each block of 256 numbers is stored as one scale, in float32, and one byte a number: a place in the dynamic map
of Dettmers et al. 2022 (arXiv 2110.02861), whose steps grow with the number, from 1e-7 (or 1e-8) of the largest to 1.

A block is a small box of the array (16 x 16, say), not a stretch of its memory: along each dimension it is a power of two
that divides the dimension, so that a device's shard holds whole blocks wherever the mesh cuts an array into multiples of
16. Bytes and scales carry the letters of their parameter, and lie on the mesh as it does.

A moment changes by a few per cent a step, which is less than half a step of the map where numbers are small: rounded to the
nearest, it would never move. (Where a gradient vanishes beside a constant one in its block, the first moment stays while the
second decays, and the parameter goes on at 1.1 times the rate for ever: 330 times the rate after 400 steps, where exact
moments come to 32.) So moments are rounded up or down by a dither, in proportion, and are right on average. The dither is a
function of the step and of the place in the array: a resumed run has the same.

Even so a ratio of rounded moments may be larger than one of exact moments can be, whatever the gradients. It is clipped to
that bound (`largest_ratio`).
"""
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from efficient_lm import axes
from efficient_lm.tree import is_variable

BLOCK = 256       # numbers that share a scale, where dims allow
SMALLEST_BLOCK = 64   # scales of smaller ones would take too much: such an array stays float32
SMALL = 4096      # so do arrays of fewer numbers, as in the paper: norms and biases, for the most part


class Blocks(NamedTuple):
  """codes: int8 (signed) or uint8, in the shape of the parameter; scale: float32, one a block, its dims those of the
  parameter over those of a block. Variables, with the parameter's letters."""
  codes: Any
  scale: Any


class State(NamedTuple):
  """count: steps, int32; mu, nu: first and second moments, each a Blocks or a float32 Variable."""
  count: Any
  mu: Any
  nu: Any


def decode(codes):
  """Values of the map in [-1, 1] (int8) or (0, 1] (uint8), float32.

  With b bits of magnitude (7 or 8), |code| = 2^i + j, 0 <= j < 2^i: the middle of the j-th of 2^i equal cells of the decade
  (10^(i - b), 10^(i - b + 1)]. Half a cell is at most 0.35 % of the largest numbers, more of smaller ones. 0 is 0 if
  signed, and 10^-b if not: a second moment must not vanish beside a first one that does not.
  """
  signed, _ = _kind(codes.dtype)
  value = _value(jnp.abs(codes.astype(jnp.float32)), codes.dtype)
  return jnp.sign(codes).astype(jnp.float32) * value if signed else value


def _value(magnitude, dtype):
  """What a code of this magnitude, a whole number in float32, stands for."""
  signed, bits = _kind(dtype)
  power = _power_of_two(magnitude)
  value = _decades(power, bits) * (0.1 + 0.9 * ((magnitude + 0.5) / power - 1))
  return jnp.where(magnitude == 0, jnp.float32(0 if signed else 10. ** -bits), value)


def encode(values, dtype, dither=None):
  """The code of the cell that a value, of magnitude 1 at most, lies in: errs by half a cell at most.

  dither: numbers in [0, 1) of the shape of the values. The code is then one of the two that the value lies between, the
  farther one if its share of the way to it is above the dither: uniform dithers give the value on average, from the smallest
  number of the map to the largest.
  """
  signed, bits = _kind(dtype)
  y = jnp.abs(values)
  power = jnp.zeros_like(y)
  for i in range(bits): power = jnp.where(y > 10. ** (i - bits), 2. ** i, power)
  share = (y / _decades(power, bits) - 0.1) / 0.9   # of the decade
  code = jnp.clip(jnp.floor(power * (1 + share)), power, jnp.maximum(2 * power - 1, 0))
  if dither is not None:
    value = _value(code, dtype)
    other = jnp.clip(code + jnp.where(y > value, 1, -1), 0, 2 ** bits - 1)
    away = _value(other, dtype) - value
    code = jnp.where(dither * jnp.abs(away) < jnp.abs(y - value), jnp.where(away == 0, code, other), code)
  return (jnp.sign(values) * code if signed else code).astype(dtype)


def dither_of(shape: tuple[int, ...], count):
  """Numbers in [0, 1): evenly spread over the steps of each place and over neighbouring places of each step (a Weyl sequence
  of the golden ratio and of its generalisations)."""
  phase = jnp.full(shape, count.astype(jnp.uint32) * jnp.uint32(0x9E3779B9))
  for dim, ratio in zip(range(len(shape)), (0xD1B54A33, 0xABC98389, 0x8CB92BA7, 0xC13FA9A9, 0x91E10DA5)):
    phase += lax.broadcasted_iota(jnp.uint32, shape, dim) * jnp.uint32(ratio)
  return phase.astype(jnp.float32) * 2. ** -32


def _kind(dtype) -> tuple[bool, int]:
  return jnp.dtype(dtype) == jnp.int8, 7 if jnp.dtype(dtype) == jnp.int8 else 8


def _power_of_two(magnitude):
  """The largest power of two that is at most `magnitude`, 1 for 0: the float without its mantissa."""
  bits = lax.bitcast_convert_type(jnp.maximum(magnitude, 1), jnp.uint32)
  return lax.bitcast_convert_type(bits & 0x7f80_0000, jnp.float32)


def _decades(power, bits: int):
  """Upper ends of the decades: 10^(i - b + 1) for 2^i."""
  decade = jnp.full_like(power, 10. ** (1 - bits))
  for i in range(1, bits): decade = jnp.where(power == 2. ** i, jnp.float32(10. ** (i - bits + 1)), decade)
  return decade


def block_shape(shape: tuple[int, ...], letters: str) -> tuple[int, ...]:
  """Sizes of a block along each dim, powers of two that divide them, BLOCK numbers in all where that is possible.

  First along letters that no mesh splits, then evenly along the others; never over experts or layers.
  """
  block, first = [1] * len(shape), len(shape) - len(letters)
  for _ in range(BLOCK.bit_length() - 1):
    free = [dim for dim, letter in enumerate(letters, first) if letter != 'E' and shape[dim] % (2 * block[dim]) == 0]
    if not free: break
    whole = [dim for dim in free if letters[dim - first] not in axes.WEIGHT]
    block[min(whole or free, key=lambda dim: (block[dim], -dim))] *= 2
  return tuple(block)


def _boxes(array, block):
  """(n0, b0, n1, b1, …) and the dims of b."""
  split = [part for size, b in zip(array.shape, block) for part in (size // b, b)]
  return array.reshape(split), tuple(range(1, 2 * array.ndim, 2))


def compress(array, block, dtype, dither=None) -> tuple[jax.Array, jax.Array]:
  """Codes and scales of an array, rounded to the nearest or by a dither of its shape. The largest number of a block is that
  of the map, exactly: it is the same after any number of steps."""
  boxes, inner = _boxes(array, block)
  scale = jnp.max(jnp.abs(boxes), inner, keepdims=True) / _value(jnp.float32(2 ** _kind(dtype)[1] - 1), dtype)
  dither = None if dither is None else _boxes(dither, block)[0]
  codes = encode(boxes / jnp.maximum(scale, jnp.finfo(jnp.float32).tiny), dtype, dither)
  return codes.reshape(array.shape), scale.reshape([size // b for size, b in zip(array.shape, block)])


def expand(codes, scale, block) -> jax.Array:
  """The float32 array that codes and scales stand for."""
  boxes, inner = _boxes(decode(codes), block)
  return (boxes * jnp.expand_dims(scale, inner)).reshape(codes.shape)


def scale_by_adam8(b1: float, b2: float, eps: float) -> optax.GradientTransformation:
  """`optax.scale_by_adam` whose moments are kept in eight bits from step to step; each step itself is float32."""
  def init(params):
    zeros = lambda dtype: jax.tree.map(lambda p: _empty(p, dtype), params, is_leaf=is_variable)
    return State(jnp.zeros((), jnp.int32), zeros(jnp.int8), zeros(jnp.uint8))

  def update(grads, state, params=None):
    count = optax.safe_increment(state.count)
    unbiased = lambda b: 1 - b ** count.astype(jnp.float32)

    def each(gradient, mu, nu):
      old_m, old_v = _load(gradient, mu), _load(gradient, nu)
      m = jax.tree.map(lambda g, m: b1 * m + (1 - b1) * g, gradient, old_m)
      v = jax.tree.map(lambda g, v: b2 * v + (1 - b2) * g * g, gradient, old_v)
      most = largest_ratio(count.astype(jnp.float32), b1, b2) if _block_of(gradient) else jnp.inf
      ratio = lambda m, v: (m / unbiased(b1)) / (jnp.sqrt(v / unbiased(b2)) + eps)
      step = jax.tree.map(lambda m, v: jnp.clip(ratio(m, v), -most, most), m, v)
      return step, _store(gradient, m, jnp.int8, count), _store(gradient, v, jnp.uint8, count)

    found = jax.tree.map(each, grads, state.mu, state.nu, is_leaf=is_variable)
    part = lambda i: jax.tree.map(lambda three: three[i], found, is_leaf=lambda node: type(node) is tuple)
    return part(0), State(count, part(1), part(2))

  return optax.GradientTransformation(init, update)


def largest_ratio(count, b1: float, b2: float):
  """The most that Adam's |m| / sqrt(v), both without bias, can be after `count` steps: by Cauchy and Schwarz, with r = b1^2
  / b2,

    m^2 <= (1 - b1)^2 (sum of (b1^2 / b2)^k over k < count) * v / (1 - b2)
  """
  if b2 == 0 < b1: return jnp.inf   # of the second moment nothing is left but the last gradient
  grown = lambda b: -1. if b == 0 else jnp.expm1(count * math.log(b))   # b^count - 1, to the last bits
  r = b1 * b1 / b2 if b1 else 0
  powers = count if r == 1 else grown(r) / (r - 1)
  return (1 - b1) * jnp.sqrt(powers * -grown(b2) / (1 - b2)) / -grown(b1)


def _block_of(variable) -> tuple[int, ...] | None:
  """Of a Variable's array; None where it stays float32."""
  (array,) = jax.tree.leaves(variable)
  block = block_shape(array.shape, variable.get_metadata().get('axes', ''))
  size = 1
  for b in block: size *= b
  return None if array.size < SMALL or size < SMALLEST_BLOCK else block


def _empty(like, dtype):
  """What `_store` makes of zeros; computed, the compiler would do so number by number."""
  block = _block_of(like)
  if block is None: return jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), like)
  scales = lambda p: jnp.zeros([size // b for size, b in zip(p.shape, block)], jnp.float32)
  return Blocks(jax.tree.map(lambda p: jnp.zeros(p.shape, dtype), like), jax.tree.map(scales, like))


def _store(like, moment, dtype, count):
  """A moment, float32 in a Variable, as it is kept for a parameter (or gradient) `like` after step `count`."""
  block = _block_of(like)
  if block is None: return moment
  packed = lambda m: compress(m, block, dtype, dither_of(m.shape, count))
  return Blocks(*(jax.tree.map(lambda m: packed(m)[i], moment) for i in range(2)))


def _load(like, stored):
  """The float32 Variable that `_store` was given, to rounding."""
  if not isinstance(stored, Blocks): return stored
  return jax.tree.map(lambda codes, scale: expand(codes, scale, _block_of(like)), stored.codes, stored.scale)
