"""The bytes of a GGUF file, version 3: what `reader` reads, written tensor by tensor.

A file appears under its name when it is whole: until then it is beside it, as '.partial'.
"""
import os
import struct
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from efficient_lm.interop.gguf import blocks, reader

ALIGNMENT = 32
NUMBERS = {name: number for number, name in reader.TENSOR_TYPES.items()}
UNSIGNED, FLOAT, BOOL, STRING, ARRAY = 4, 6, reader.BOOL, reader.STRING, reader.ARRAY   # types of values
INTEGERS, FLOATS = (5, np.dtype('<i4')), (FLOAT, np.dtype('<f4'))                          # of arrays


class Line(NamedTuple):
  """A tensor to be written. shape: outermost dimension first; make: its bytes, made when they are written."""
  shape: tuple[int, ...]
  kind: str
  make: Callable[[], np.ndarray]

  @property
  def num_bytes(self) -> int:
    count, size = blocks.layout(self.kind)
    return int(np.prod(self.shape)) // count * size


def write(path: str, metadata: Mapping[str, Any], lines: Mapping[str, Line]):
  """metadata: strings, bools, ints (32 bits, unsigned), floats (32 bits), lists of strings, arrays of numbers, by key."""
  partial = f'{path}.partial'
  try:
    with open(partial, 'wb') as file:
      file.write(_head(metadata, lines))
      file.write(bytes(-file.tell() % ALIGNMENT))
      for name, line in lines.items():
        raw = np.ascontiguousarray(line.make())
        if raw.nbytes != line.num_bytes: raise RuntimeError(f'{name} has {raw.nbytes} bytes, not {line.num_bytes}')
        file.write(raw.view(np.uint8).reshape(-1).data)
        file.write(bytes(-raw.nbytes % ALIGNMENT))
    os.replace(partial, path)
  finally:
    if os.path.exists(partial): os.remove(partial)


def _head(metadata: Mapping[str, Any], lines: Mapping[str, Line]) -> bytes:
  parts = [b'GGUF', struct.pack('<IQQ', 3, len(lines), len(metadata))]
  parts += [_text(key) + _value(value) for key, value in metadata.items()]
  offset = 0
  for name, line in lines.items():
    dims = struct.pack(f'<I{len(line.shape)}Q', len(line.shape), *line.shape[::-1])
    parts.append(_text(name) + dims + struct.pack('<IQ', NUMBERS[line.kind], offset))
    offset += line.num_bytes + -line.num_bytes % ALIGNMENT
  return b''.join(parts)


def _text(value: str) -> bytes:
  raw = value.encode()
  return struct.pack('<Q', len(raw)) + raw


def _value(value) -> bytes:
  match value:
    case bool(): return struct.pack('<I?', BOOL, value)
    case int(): return struct.pack('<II', UNSIGNED, value)
    case float(): return struct.pack('<If', FLOAT, value)
    case str(): return struct.pack('<I', STRING) + _text(value)
    case list(): return struct.pack('<IIQ', ARRAY, STRING, len(value)) + b''.join(map(_text, value))
  kind, dtype = INTEGERS if np.issubdtype(value.dtype, np.integer) else FLOATS
  return struct.pack('<IIQ', ARRAY, kind, value.size) + value.astype(dtype).tobytes()
