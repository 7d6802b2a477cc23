"""Matrices in few bits as blocks of GGUF that hold the very same numbers: the inverse of `blocks`, without any rounding.

An engine's own quantizer maps the largest magnitude of a block to its lowest level, and would move most of the numbers that
GPTQ or training has chosen. Here codes are copied, and only scales, which blocks have in float16, are rounded where they are
not of that precision already; formats with scale_dtype='float16' are.

Alphabet: O outputs, I inputs, Q groups that share a scale, n blocks of a row, C numbers of a block.
"""
import numpy as np

from efficient_lm.formats import MXFP4, Affine, Format, FullRangeInt, Int, Ternary
from efficient_lm.formats.floating import E2M1
from efficient_lm.interop.gguf import blocks
from efficient_lm.interop.written import Stored

TERNARY = ('TQ2_0', 'TQ1_0')   # 2.06 bits a number, and 1.69, which takes more time to read
HALF = np.float16


def kind_of(stored: Stored, ternary: str = 'TQ2_0') -> str | None:
  """The kind of block that holds the numbers of a matrix; None where there is none, or where groups do not fill blocks."""
  kind = _kind(stored.format, stored.zero_OQ is not None, ternary)
  return kind if kind and group(stored) % blocks.layout(kind)[0] == 0 else None


def fix(stored: Stored) -> str:
  """What to do about a matrix without a kind, in a line."""
  kind = _kind(stored.format, stored.zero_OQ is not None, TERNARY[0])
  if kind is None: return 'GGUF has no block for it: quantize to Int(bits=4, scales=Group(size=32)), or to Int()'
  count = blocks.layout(kind)[0]
  return f'its {group(stored)} inputs with one scale do not fill blocks of {count}: choose groups of a multiple of {count}'


def group(stored: Stored) -> int:
  """Inputs that share a scale."""
  return stored.shape[1] // stored.step_OQ.shape[1]


def _kind(format: Format, has_zero: bool, ternary: str) -> str | None:
  if isinstance(format, MXFP4): return 'MXFP4'
  if isinstance(format, Ternary) or (isinstance(format, Int) and format.bits == 2 and not has_zero): return ternary
  of_integers = {(4, False): 'Q4_0', (4, True): 'Q4_1', (8, False): 'Q8_0'}
  if isinstance(format, (Int, FullRangeInt, Affine)): return of_integers.get((format.bits, has_zero))
  return None


def pack(stored: Stored, kind: str) -> np.ndarray:
  """The blocks of a matrix, uint8 (O, bytes of a row). Raises ValueError for codes or scales that the blocks cannot hold."""
  count, record = blocks.RECORDS[kind]
  O, I = stored.shape
  made = np.empty((O, I // count), record)
  numbers_OnC = stored.numbers_OI.reshape(O, -1, count)
  each = lambda x_OQ: np.repeat(x_OQ, group(stored) // count, axis=1)   # block for block
  _PACK[kind](made, numbers_OnC, stored, each)
  return made.view(np.uint8).reshape(O, -1)


def moved(stored: Stored, kind: str) -> float:
  """By how much numbers differ in blocks, at most: of a step in Q4_1, otherwise of their own size. 0 where all are exact."""
  if kind == 'MXFP4': return 0.0
  step = stored.step_OQ.astype(np.float64)
  kept = _half(stored.step_OQ).astype(np.float64)
  if kind != 'Q4_1': return float(np.max(np.abs(kept / step - 1)))
  least, written = _least(stored, np.float64), _half(_least(stored)).astype(np.float64)
  ends = [np.abs(kept * u + written - (step * u + least)) / step for u in (0, 15)]   # linear between them
  return float(np.max(ends))


def _half(scale) -> np.ndarray:
  """Raises ValueError where the nearest float16 is not finite."""
  with np.errstate(over='ignore'): half = scale.astype(HALF)
  if not np.isfinite(half).all(): raise ValueError('a scale is larger than float16 can hold, 65504')
  return half


def _codes(numbers_OnC, least: int, levels: int) -> np.ndarray:
  """Whole numbers from `least` as uint8 codes from 0. Raises ValueError for others."""
  codes = numbers_OnC.astype(np.int16) - least
  if codes.min() < 0 or codes.max() >= levels: raise ValueError(f'a code is not among the {levels} from {least}')
  return codes.astype(np.uint8)


def _nibbles(codes_OnC) -> np.ndarray:
  """The first half of a block in low bits, the second in high ones."""
  half = codes_OnC.shape[-1] // 2
  return codes_OnC[..., :half] | codes_OnC[..., half:] << np.uint8(4)


def _least(stored: Stored, dtype=np.float32) -> np.ndarray:
  """The numbers that the lowest codes stand for."""
  step, zero = stored.step_OQ.astype(dtype), stored.zero_OQ.astype(dtype)
  return zero if isinstance(stored.format, Affine) else -(zero + 8) * step


def _q4_0(made, numbers_OnC, stored, each):
  made['d'], made['low'] = each(_half(stored.step_OQ)), _nibbles(_codes(numbers_OnC, -8, 16))


def _q4_1(made, numbers_OnC, stored, each):
  made['d'], made['m'] = each(_half(stored.step_OQ)), each(_half(_least(stored)))
  made['low'] = _nibbles(_codes(numbers_OnC, -8, 16))


def _q8_0(made, numbers_OnC, stored, each):
  made['d'], made['q'] = each(_half(stored.step_OQ)), numbers_OnC


def _tq2_0(made, numbers_OnC, stored, each):
  """Four numbers to a byte, 32 bytes to a run."""
  planes = _codes(numbers_OnC, -1, 3).reshape(*numbers_OnC.shape[:2], 2, 4, 32)
  packed = planes[..., 0, :] | planes[..., 1, :] << 2 | planes[..., 2, :] << 4 | planes[..., 3, :] << 6
  made['d'], made['q'] = each(_half(stored.step_OQ)), packed.reshape(*numbers_OnC.shape[:2], 64)


def _tq1_0(made, numbers_OnC, stored, each):
  """Five digits of base 3 to a byte, which holds the fraction that they are of 3^5, in 256ths and rounded up."""
  codes = _codes(numbers_OnC, -1, 3)

  def fractions(digits, run: int):
    planes = digits.reshape(*digits.shape[:2], -1, run).astype(np.uint16)
    powers = np.array([81, 27, 9, 3, 1], np.uint16)[:planes.shape[2], None]
    return (((planes * powers).sum(2, dtype=np.uint16).astype(np.uint32) * 256 + 242) // 243).astype(np.uint8)
  made['q'] = np.concatenate([fractions(codes[..., :160], 32), fractions(codes[..., 160:240], 16)], -1)
  made['rest'], made['d'] = fractions(codes[..., 240:], 4), each(_half(stored.step_OQ))


def _mxfp4(made, numbers_OnC, stored, each):
  """Floats of 4 bits: sign, and which of eight magnitudes. Minus zero is written as it is, and read as 0."""
  mantissa, exponent = np.frexp(stored.step_OQ)
  if (mantissa != 0.5).any(): raise ValueError('a scale of MXFP4 is no power of two')
  magnitudes = np.abs(numbers_OnC)
  codes = np.searchsorted(E2M1, magnitudes).astype(np.uint8)
  if (np.take(E2M1, np.minimum(codes, 7)) != magnitudes).any(): raise ValueError('a number is not among those of 4 bits')
  made['exponent'] = each((exponent - 1 + 127).astype(np.uint8))
  made['low'] = _nibbles(codes | np.signbit(numbers_OnC).astype(np.uint8) << np.uint8(3))


_PACK = {'Q4_0': _q4_0, 'Q4_1': _q4_1, 'Q8_0': _q8_0, 'TQ1_0': _tq1_0, 'TQ2_0': _tq2_0, 'MXFP4': _mxfp4}
