"""The number formats of GGUF tensors, and the floats that their blocks stand for.

A row is cut into blocks of 32 or 256 numbers, each packed with its scales into a record; `RECORDS` lays the bytes of each
format out, `numbers` says what they mean. Sources: ggml-common.h and ggml-quants.c of llama.cpp; every operation is in
float32 and in the order of the package `gguf` 0.19.0 (quants.py), whose results these are, bit for bit.

Alphabet of this file: n blocks, C numbers of a block, and letters of the formats themselves (d a scale, m an offset).
"""
import ml_dtypes
import numpy as np

PLAIN = {'F32': np.dtype('<f4'), 'F16': np.dtype('<f2'), 'BF16': np.dtype(ml_dtypes.bfloat16)}   # no blocks

_HALF, _BYTE = '<f2', 'u1'
RECORDS = {   # fields of a block in the order of its bytes, and how many numbers it holds
  'Q4_0': (32, [('d', _HALF), ('low', _BYTE, 16)]),
  'Q4_1': (32, [('d', _HALF), ('m', _HALF), ('low', _BYTE, 16)]),
  'Q5_0': (32, [('d', _HALF), ('high', _BYTE, 4), ('low', _BYTE, 16)]),
  'Q5_1': (32, [('d', _HALF), ('m', _HALF), ('high', _BYTE, 4), ('low', _BYTE, 16)]),
  'Q8_0': (32, [('d', _HALF), ('q', 'i1', 32)]),
  'Q2_K': (256, [('scales', _BYTE, 16), ('q', _BYTE, 64), ('d', _HALF), ('m', _HALF)]),
  'Q3_K': (256, [('high', _BYTE, 32), ('low', _BYTE, 64), ('scales', _BYTE, 12), ('d', _HALF)]),
  'Q4_K': (256, [('d', _HALF), ('m', _HALF), ('scales', _BYTE, 12), ('low', _BYTE, 128)]),
  'Q5_K': (256, [('d', _HALF), ('m', _HALF), ('scales', _BYTE, 12), ('high', _BYTE, 32), ('low', _BYTE, 128)]),
  'Q6_K': (256, [('low', _BYTE, 128), ('high', _BYTE, 64), ('scales', 'i1', 16), ('d', _HALF)]),
  'TQ1_0': (256, [('q', _BYTE, 48), ('rest', _BYTE, 4), ('d', _HALF)]),
  'TQ2_0': (256, [('q', _BYTE, 64), ('d', _HALF)]),
  'MXFP4': (32, [('exponent', _BYTE), ('low', _BYTE, 16)]),
}
RECORDS = {kind: (count, np.dtype(fields)) for kind, (count, fields) in RECORDS.items()}
KINDS = (*PLAIN, *RECORDS)   # all that are read
AT_ONCE = 2 ** 20            # numbers that are dequantized together: what is made on the way stays in a core's cache


def layout(kind: str) -> tuple[int, int]:
  """Numbers in a block, and its bytes."""
  if kind in PLAIN: return 1, PLAIN[kind].itemsize
  count, record = RECORDS[kind]
  return count, record.itemsize


def dtype(kind: str) -> np.dtype:
  """Of the numbers once they are read: that of the file, or float32 where blocks are dequantized."""
  return PLAIN.get(kind, np.dtype(np.float32))


def decode(raw: np.ndarray, kind: str) -> np.ndarray:
  """The numbers of a run of bytes, one after another, in `dtype(kind)`. raw: uint8, whole blocks, of any address."""
  if kind in PLAIN: return raw.view(PLAIN[kind])
  count, record = RECORDS[kind]
  blocks = raw.view(record)
  made = np.empty((len(blocks), count), np.float32)
  step = AT_ONCE // count
  with np.errstate(invalid='ignore', over='ignore'):   # a damaged scale is not finite, and so are its numbers
    for i in range(0, len(blocks), step): made[i:i + step] = _NUMBERS[kind](blocks[i:i + step])
  return made.reshape(-1)


def _float(column):
  """(n, …) of any type -> float32."""
  return np.asarray(column).astype(np.float32)


def _scale(column):
  """(n,) -> float32 (n, 1)."""
  return _float(column)[:, None]


def _planes(packed, width: int, run: int):
  """Numbers of `width` bits, lowest first: each run of bytes holds all first numbers, then all second ones: (n, C) uint8."""
  shifts = np.arange(0, 8, width, dtype=np.uint8)[:, None]
  runs = packed.reshape(len(packed), -1, 1, run)
  return ((runs >> shifts) & np.uint8(2 ** width - 1)).reshape(len(packed), -1)


def _nibbles(blocks):
  return _planes(blocks['low'], 4, 16)


def _five_bits(blocks):
  """As nibbles; the fifth bit of number i is bit i of `high`."""
  return _nibbles(blocks) | np.unpackbits(blocks['high'], axis=-1, bitorder='little') << np.uint8(4)


def _q4_0(blocks): return _scale(blocks['d']) * (_float(_nibbles(blocks)) - 8)
def _q4_1(blocks): return _scale(blocks['d']) * _float(_nibbles(blocks)) + _scale(blocks['m'])
def _q5_0(blocks): return _scale(blocks['d']) * (_float(_five_bits(blocks)) - 16)
def _q5_1(blocks): return _scale(blocks['d']) * _float(_five_bits(blocks)) + _scale(blocks['m'])
def _q8_0(blocks): return _float(blocks['q']) * _scale(blocks['d'])


def _grouped(numbers, scales, offsets=None):
  """Groups of numbers in a block, each with a scale: scale * numbers - offset, (n, C)."""
  parts = scales[:, :, None] * _float(numbers).reshape(*scales.shape, -1)
  return (parts if offsets is None else parts - offsets[:, :, None]).reshape(len(numbers), -1)


def _q2_k(blocks):
  scales = _scale(blocks['d']) * _float(blocks['scales'] & 15)
  offsets = _scale(blocks['m']) * _float(blocks['scales'] >> 4)
  return _grouped(_planes(blocks['q'], 2, 32), scales, offsets)


def _q3_k(blocks):
  """Scales have 6 bits: 4 in the first 8 bytes, 2 in the last 4. A number is 4 less where its bit of `high` is unset."""
  low, high = blocks['scales'][:, :8], blocks['scales'][:, 8:]
  scales = _float(_planes(low, 4, 8) | _planes(high, 2, 4) << np.uint8(4)) - 32
  numbers = _float(_planes(blocks['low'], 2, 32)) - _float((_planes(blocks['high'], 1, 32) ^ 1) << np.uint8(2))
  return _grouped(numbers, _scale(blocks['d']) * scales)


def _eight_scales(blocks):
  """Eight scales and eight offsets of 6 bits in 12 bytes: the first four of each as they are; of the last four, 4 bits in
  the last bytes and 2 in the highest bits of the first."""
  a, b, c = (blocks['scales'][:, i:i + 4] for i in (0, 4, 8))
  scales = np.concatenate([a & 63, c & 15 | a >> 2 & 48], -1)
  offsets = np.concatenate([b & 63, c >> 4 | b >> 2 & 48], -1)
  return _scale(blocks['d']) * _float(scales), _scale(blocks['m']) * _float(offsets)


def _q4_k(blocks): return _grouped(_planes(blocks['low'], 4, 32), *_eight_scales(blocks))


def _q5_k(blocks):
  return _grouped(_planes(blocks['low'], 4, 32) | _planes(blocks['high'], 1, 32) << np.uint8(4), *_eight_scales(blocks))


def _q6_k(blocks):
  numbers = _planes(blocks['low'], 4, 64) | _planes(blocks['high'], 2, 32) << np.uint8(4)
  return _grouped(_float(numbers) - 32, _scale(blocks['d']) * _float(blocks['scales']))


def _tq1_0(blocks):
  """Five digits of base 3 to a byte, as a fraction of 256: a digit is what times 3 carries over into the next byte."""
  def digits(packed, count):
    powers = np.array([[1], [3], [9], [27], [81]], np.uint8)[:count]
    return (packed[:, None] * powers).reshape(len(packed), -1)   # overflows on purpose: digits before are dropped
  parts = [digits(blocks['q'][:, :32], 5), digits(blocks['q'][:, 32:], 5), digits(blocks['rest'], 4)]
  numbers = np.concatenate(parts, -1).astype(np.uint16) * 3 >> 8
  return _scale(blocks['d']) * (_float(numbers) - 1)


def _tq2_0(blocks): return _scale(blocks['d']) * (_float(_planes(blocks['q'], 2, 32)) - 1)


_E2M1 = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.float32)   # twice the numbers


def _mxfp4(blocks):
  """Half of 2 ** (exponent - 127), written as the bits of a float: the two smallest are subnormal."""
  exponent = blocks['exponent'].astype(np.uint32)
  bits = np.where(exponent < 2, np.uint32(0x200000) << np.minimum(exponent, 1), (np.maximum(exponent, 1) - 1) << 23)
  return _scale(bits.astype(np.uint32).view(np.float32)) * _E2M1[_nibbles(blocks)]


_NUMBERS = {'Q4_0': _q4_0, 'Q4_1': _q4_1, 'Q5_0': _q5_0, 'Q5_1': _q5_1, 'Q8_0': _q8_0, 'Q2_K': _q2_k, 'Q3_K': _q3_k,
            'Q4_K': _q4_k, 'Q5_K': _q5_k, 'Q6_K': _q6_k, 'TQ1_0': _tq1_0, 'TQ2_0': _tq2_0, 'MXFP4': _mxfp4}
