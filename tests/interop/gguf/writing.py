"""Small GGUF files for tests, written from the description of the format and not by the code that reads it."""
import struct

import numpy as np

SCALARS = {'u8': (0, 'B'), 'i8': (1, 'b'), 'u16': (2, 'H'), 'i16': (3, 'h'), 'u32': (4, 'I'), 'i32': (5, 'i'),
           'f32': (6, 'f'), 'bool': (7, 'B'), 'u64': (10, 'Q'), 'i64': (11, 'q'), 'f64': (12, 'd')}
KINDS = {'F32': 0, 'F16': 1, 'Q4_0': 2, 'Q4_1': 3, 'Q5_0': 6, 'Q5_1': 7, 'Q8_0': 8, 'Q2_K': 10, 'Q3_K': 11, 'Q4_K': 12,
         'Q5_K': 13, 'Q6_K': 14, 'IQ4_NL': 20, 'BF16': 30, 'TQ1_0': 34, 'TQ2_0': 35, 'MXFP4': 39}


def text(value: str | bytes) -> bytes:
  raw = value if isinstance(value, bytes) else value.encode()
  return struct.pack('<Q', len(raw)) + raw


def value(given) -> bytes:
  """A value with its type: ('u64', 3) or, by Python's types, a bool, an int (u32), a float (f32), a string, a list."""
  if isinstance(given, tuple):
    number, form = SCALARS[given[0]]
    return struct.pack(f'<I{form}', number, given[1])
  if isinstance(given, bool): return value(('bool', given))
  if isinstance(given, int): return value(('u32', given))
  if isinstance(given, float): return value(('f32', given))
  if isinstance(given, str): return struct.pack('<I', 8) + text(given)
  parts = [value(one) for one in given] or [value('')]
  numbers = b''.join(part[4:] for part in parts[:len(given)])
  return struct.pack('<I', 9) + parts[0][:4] + struct.pack('<Q', len(given)) + numbers


def key(name: str, given) -> bytes:
  return text(name) + value(given)


def line(name: str, shape, kind: int, offset: int) -> bytes:
  """Of the table of tensors. shape: outermost dimension first."""
  return text(name) + struct.pack(f'<I{len(shape)}QIQ', len(shape), *shape[::-1], kind, offset)


def head(num_tensors: int, num_keys: int, version: int = 3) -> bytes:
  return b'GGUF' + struct.pack('<IQQ', version, num_tensors, num_keys)


def file(metadata: dict, tensors: dict, version: int = 3) -> bytes:
  """tensors: float32 arrays, or (kind, shape, bytes) of any other kind, by name."""
  alignment = metadata.get('general.alignment', 32)
  table, data = b'', b''
  for name, given in tensors.items():
    kind, shape, raw = ('F32', given.shape, np.float32(given).tobytes()) if isinstance(given, np.ndarray) else given
    table += line(name, shape, KINDS[kind], len(data))
    data += raw + bytes(-len(raw) % alignment)
  begin = head(len(tensors), len(metadata), version) + b''.join(key(*item) for item in metadata.items()) + table
  return begin + bytes(-len(begin) % alignment) + data
