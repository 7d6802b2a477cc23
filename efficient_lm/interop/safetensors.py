"""One file of the format safetensors (huggingface/safetensors, README, "Format"), mapped and never trusted.

  8 bytes         n, little-endian
  n bytes         JSON: {name: {"dtype", "shape", "data_offsets": [begin, end]}, …, "__metadata__": {text: text}}
  the rest        the tensors, without gaps

A file is refused as a whole before anything of it is used: every byte belongs to exactly one tensor, and every tensor is as
long as its shape and dtype say. The rules are those of the package `safetensors`, which makes copies; here tensors are views
of the mapped file, in dtypes that numpy has through ml_dtypes.
"""
import json
import math
import mmap
import os
from collections.abc import Mapping

import ml_dtypes
import numpy as np

from efficient_lm.errors import CheckpointError
from efficient_lm.interop.checkpoint import Tensor, let_go

LARGEST_HEADER = 100_000_000   # bytes, as in the package
DTYPES = {name: np.dtype(dtype) for name, dtype in {
  'F64': np.float64, 'F32': np.float32, 'F16': np.float16, 'BF16': ml_dtypes.bfloat16, 'I64': np.int64, 'I32': np.int32,
  'I16': np.int16, 'I8': np.int8, 'U64': np.uint64, 'U32': np.uint32, 'U16': np.uint16, 'U8': np.uint8, 'BOOL': np.bool_,
  'F8_E4M3': ml_dtypes.float8_e4m3fn, 'F8_E5M2': ml_dtypes.float8_e5m2, 'F8_E8M0': ml_dtypes.float8_e8m0fnu}.items()}


def read(path) -> dict[str, Tensor]:
  """The tensors of a file, none of them read. Raises CheckpointError, in one line that names the file."""
  try:
    with open(path, 'rb') as file:
      size = os.fstat(file.fileno()).st_size
      begin, header = _header(file, size)
      mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
  except OSError as error: raise CheckpointError(f'{path}: {error.strerror or error}') from error
  except ValueError as error: raise CheckpointError(f'{path} is no intact safetensors file: {error}') from error
  return {name: _tensor(mapped, begin, *entry) for name, entry in header.items()}


def unique(pairs) -> dict:
  """For `json.loads`: an object none of whose keys stands twice. Raises ValueError."""
  found = dict(pairs)
  if len(found) == len(pairs): return found
  names = [name for name, _ in pairs]
  raise ValueError(f'{next(name for name in names if names.count(name) > 1)!r} stands in it twice')


def parse(text: bytes | str):
  """Strict JSON. Raises ValueError for what is none, for an object with a key twice, and for one nested without measure."""
  try: return json.loads(text, object_pairs_hook=unique)
  except RecursionError: raise ValueError('its JSON is nested too deeply') from None
  except UnicodeDecodeError: raise ValueError('its JSON is not UTF-8') from None
  except json.JSONDecodeError as error:
    raise ValueError(f'its JSON breaks off at character {error.pos}: {error.msg}') from None


def _header(file, size: int) -> tuple[int, dict]:
  """Where the tensors begin; of each its dtype, shape, and place among them. Raises ValueError."""
  if size < 8: raise ValueError(f'it has {size} bytes')
  length = int.from_bytes(file.read(8), 'little')
  if length > LARGEST_HEADER: raise ValueError(f'its header would have {length} bytes, above {LARGEST_HEADER}')
  if 8 + length > size: raise ValueError(f'its header ends at byte {8 + length}, the file at {size}')
  text = file.read(length)
  if not text.startswith(b'{'): raise ValueError('its header is no JSON object')
  header = parse(text)
  metadata = header.pop('__metadata__', None) or {}
  if not isinstance(metadata, Mapping): raise ValueError('its __metadata__ is no object')
  entries = {name: _entry(name, entry) for name, entry in header.items()}
  _check_places(entries, size - 8 - length)
  return 8 + length, entries


def _entry(name: str, entry) -> tuple[np.dtype, tuple[int, ...], int, int]:
  """dtype, shape, first byte and the one behind the last. Raises ValueError."""
  whole = lambda value: isinstance(value, int) and not isinstance(value, bool) and value >= 0
  if not isinstance(entry, dict) or set(entry) != {'dtype', 'shape', 'data_offsets'}:
    raise ValueError(f'{name!r} has not exactly a dtype, a shape and data_offsets')
  dtype, shape, offsets = entry['dtype'], entry['shape'], entry['data_offsets']
  if not isinstance(dtype, str) or dtype not in DTYPES:
    raise ValueError(f'{name!r} is of dtype {dtype!r}; there are {", ".join(DTYPES)}')
  if not isinstance(shape, list) or len(shape) > 32 or not all(map(whole, shape)):
    raise ValueError(f'{name!r} has no shape of whole numbers')
  if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(whole, offsets)):
    raise ValueError(f'{name!r} has no two data_offsets')
  needed = math.prod(shape) * DTYPES[dtype].itemsize
  if offsets[1] - offsets[0] != needed:
    raise ValueError(f'{name!r} has {offsets[1] - offsets[0]} bytes; its shape and dtype need {needed}')
  return DTYPES[dtype], tuple(shape), *offsets


def _check_places(entries: dict, size: int):
  """Raises ValueError unless the tensors lie one behind the other and fill `size` bytes."""
  end = 0
  for name, (_, _, begin, stop) in sorted(entries.items(), key=lambda item: item[1][2:]):
    if begin != end: raise ValueError(f'{name!r} begins at byte {begin}, where {end} is next')
    end = stop
  if end != size: raise ValueError(f'its tensors end at byte {end} of {size}: it is cut short, or not whole')


def _tensor(mapped, start: int, dtype, shape, begin: int, end: int) -> Tensor:
  fetch = lambda: np.frombuffer(mapped, np.uint8, end - begin, start + begin).view(dtype).reshape(shape)
  return Tensor(shape, dtype, fetch, release=lambda: let_go(mapped, start + begin, start + end))


def write(path, tensors: Mapping[str, np.ndarray]):
  """Writes a file of these tensors, the widest numbers first, so that each lies at a multiple of its size."""
  names = {dtype: name for name, dtype in DTYPES.items()}
  order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
  header, end = {'__metadata__': {'format': 'pt'}}, 0   # without the format, older versions of transformers refuse it
  for name in order:
    begin, end = end, end + tensors[name].nbytes
    header[name] = dict(dtype=names[tensors[name].dtype], shape=list(tensors[name].shape), data_offsets=[begin, end])
  text = json.dumps(header).encode()
  text += b' ' * (-len(text) % 8)
  with open(path, 'wb') as file:
    file.write(len(text).to_bytes(8, 'little') + text)
    for name in order: file.write(np.ascontiguousarray(tensors[name]).reshape(-1).view(np.uint8).data)
    file.flush()
    os.fsync(file.fileno())
