"""GGUF files, version 2 and 3: metadata and a table of tensors, checked before any number is read.

  'GGUF', version u32, number of tensors u64, number of keys u64
  each key: name, type u32, value;  each tensor: name, number of dimensions u32, dimensions u64 (innermost first), type u32,
  offset u64 from the beginning of the data, which is aligned (`general.alignment`, 32 bytes by default)

Source: docs/gguf.md of ggml. A file is data from strangers: nothing in it is believed before it is compared with the size of
the file, so that no count makes this program allocate or loop for more than the file holds.
"""
import dataclasses
import itertools
import mmap
import os
import stat
import struct
from typing import Any

import numpy as np

from efficient_lm.errors import CheckpointError
from efficient_lm.interop.checkpoint import let_go
from efficient_lm.interop.gguf import blocks

MAX_ENTRIES = 2 ** 16   # keys, or tensors: far more than any model has
MAX_DIMS = 4
MAX_NAME = 2 ** 16 - 1

# Numbers of the types of tensors (ggml.h). Those that `blocks` does not know are refused by name.
TENSOR_TYPES = {
  0: 'F32', 1: 'F16', 2: 'Q4_0', 3: 'Q4_1', 6: 'Q5_0', 7: 'Q5_1', 8: 'Q8_0', 9: 'Q8_1', 10: 'Q2_K', 11: 'Q3_K', 12: 'Q4_K',
  13: 'Q5_K', 14: 'Q6_K', 15: 'Q8_K', 16: 'IQ2_XXS', 17: 'IQ2_XS', 18: 'IQ3_XXS', 19: 'IQ1_S', 20: 'IQ4_NL', 21: 'IQ3_S',
  22: 'IQ2_S', 23: 'IQ4_XS', 24: 'I8', 25: 'I16', 26: 'I32', 27: 'I64', 28: 'F64', 29: 'IQ1_M', 30: 'BF16', 34: 'TQ1_0',
  35: 'TQ2_0', 39: 'MXFP4', 40: 'NVFP4'}
# Types of values, by their number. 8 is a string, 9 an array of one of the others.
SCALARS = {0: '<u1', 1: '<i1', 2: '<u2', 3: '<i2', 4: '<u4', 5: '<i4', 6: '<f4', 7: '?', 10: '<u8', 11: '<i8', 12: '<f8'}
BOOL, STRING, ARRAY = 7, 8, 9


@dataclasses.dataclass(frozen=True)
class Entry:
  """A tensor's line in the table. shape: outermost dimension first; begin: of its bytes, in the file."""
  shape: tuple[int, ...]
  kind: str
  begin: int
  num_bytes: int


@dataclasses.dataclass(frozen=True)
class File:
  """What a file holds. metadata: strings, numbers, lists of strings, and numpy arrays of numbers, by key."""
  path: str
  metadata: dict[str, Any]
  tensors: dict[str, Entry]
  head_bytes: int
  _map: mmap.mmap

  def head(self) -> bytes:
    """All that stands before the data: metadata and table."""
    return self._map[:self.head_bytes]

  def bytes_of(self, name: str) -> np.ndarray:
    """The bytes of a tensor as they lie in the file (uint8, read-only, mapped)."""
    entry = self.tensors[name]
    return np.frombuffer(self._map, np.uint8, entry.num_bytes, entry.begin)

  def let_go(self, name: str):
    """Of what of a tensor is in memory: see `checkpoint.let_go`."""
    entry = self.tensors[name]
    let_go(self._map, entry.begin, entry.begin + entry.num_bytes)

  def numbers(self, name: str, first: int | None = None) -> np.ndarray:
    """A tensor as an array, or what it holds at index `first` of its first dimension: mapped where it has no blocks,
    dequantized to float32 where it has."""
    entry, raw = self.tensors[name], self.bytes_of(name)
    if first is None: return blocks.decode(raw, entry.kind).reshape(entry.shape)
    return blocks.decode(raw.reshape(entry.shape[0], -1)[first], entry.kind).reshape(entry.shape[1:])


def read(path) -> File:
  """Raises CheckpointError, with the file's name, for a file that is damaged, cut short or stored in a way not known."""
  path = os.fspath(path)
  try:
    # Opening a pipe would wait for ever.
    if not stat.S_ISREG(os.stat(path).st_mode): raise _Damaged('is no regular file')
    with open(path, 'rb') as file:
      if not os.fstat(file.fileno()).st_size: raise _Damaged('is empty')
      mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    return _parse(path, mapped)
  except OSError as error: raise CheckpointError(f'{path} cannot be read: {error.strerror or error}') from error
  except ValueError as error: raise CheckpointError(f'{path} {error}') from error


class _Damaged(ValueError):
  """Why a file is not read: the rest of a sentence that begins with its name."""


class _Cursor:
  """Reads one thing after another from the front of a file."""

  def __init__(self, mapped):
    self.mapped, self.at, self.end = mapped, 0, len(mapped)

  def skip(self, size: int, what: str) -> int:
    """The place of the next `size` bytes, which there must be."""
    begin = self.at
    if size > self.end - begin: raise _Damaged(f'is damaged or cut short: it ends within {what}')
    self.at = begin + size
    return begin

  def number(self, form: str, what: str):
    return struct.unpack_from('<' + form, self.mapped, self.skip(struct.calcsize('<' + form), what))[0]

  def count(self, each: int, what: str, most: int | None = None) -> int:
    """A number of things that take at least `each` bytes: no more than the rest of the file has room for."""
    found = self.number('Q', what)
    if found > (self.end - self.at) // each: raise _Damaged(f'is damaged: {found} {what} do not fit in it')
    if most is not None and found > most: raise _Damaged(f'has {found} {what}: at most {most} are read')
    return found

  def text(self, what: str, most: int | None = None) -> str:
    size = self.count(1, f'bytes of {what}', most)
    begin = self.skip(size, what)
    try: return self.mapped[begin:begin + size].decode()
    except UnicodeDecodeError: raise _Damaged(f'is damaged: {what} is no text in UTF-8') from None

  def value(self, kind: int, what: str):
    if kind == STRING: return self.text(what)
    if kind == ARRAY: return self.array(what)
    if kind not in SCALARS: raise _Damaged(f'is damaged: {what} has type {kind}, which does not exist')
    return self.numbers(kind, 1, what)[0].item()

  def array(self, what: str):
    kind = self.number('I', what)
    if kind == STRING: return [self.text(what) for _ in range(self.count(8, f'strings of {what}'))]
    if kind not in SCALARS: raise _Damaged(f'holds an array in {what} of type {kind}, which is not read')
    return self.numbers(kind, self.count(np.dtype(SCALARS[kind]).itemsize, f'numbers of {what}'), what)

  def numbers(self, kind: int, count: int, what: str) -> np.ndarray:
    dtype = np.dtype(SCALARS[kind])
    begin = self.skip(count * dtype.itemsize, what)
    if kind == BOOL and count and np.frombuffer(self.mapped, np.uint8, count, begin).max() > 1:
      raise _Damaged(f'is damaged: {what} is neither true nor false')
    return np.frombuffer(self.mapped, dtype, count, begin)


def _parse(path: str, mapped) -> File:
  cursor = _Cursor(mapped)
  if mapped[:4] != b'GGUF': raise _Damaged('is no GGUF file: it does not begin with GGUF')
  cursor.skip(4, 'its head')
  version = cursor.number('I', 'its head')
  if version and not version % 2 ** 16: raise _Damaged('is a big-endian GGUF file: only little-endian ones are read')
  if version not in (2, 3): raise _Damaged(f'is a GGUF file of version {version}: 2 and 3 are read')
  num_tensors = cursor.count(24, 'tensors', MAX_ENTRIES)
  num_keys = cursor.count(13, 'keys', MAX_ENTRIES)
  metadata = {}
  for i in range(num_keys):
    name = cursor.text(f'the name of key {i}', MAX_NAME)
    if name in metadata: raise _Damaged(f'is damaged: it has the key {quoted(name)} twice')
    metadata[name] = cursor.value(cursor.number('I', quoted(name)), quoted(name))
  table = {}
  for i in range(num_tensors):
    name = cursor.text(f'the name of tensor {i}', MAX_NAME)
    if name in table: raise _Damaged(f'is damaged: it has the tensor {quoted(name)} twice')
    table[name] = _line(cursor, quoted(name))
  return File(path, metadata, _placed(table, cursor, metadata), cursor.at, mapped)


def quoted(name: str) -> str:
  """Text of a file as it may stand in a message: short and in one line."""
  return repr(name if len(name) <= 60 else name[:57] + '...')


def _line(cursor: _Cursor, name: str) -> Entry:
  """A line of the table, its `begin` still counted from the beginning of the data."""
  num_dims = cursor.number('I', name)
  if not 1 <= num_dims <= MAX_DIMS: raise _Damaged(f'is damaged: {name} has {num_dims} dimensions')
  shape = tuple(cursor.number('Q', name) for _ in range(num_dims))[::-1]
  number = cursor.number('I', name)
  begin = cursor.number('Q', name)
  kind = TENSOR_TYPES.get(number, f'type {number}')
  if kind not in blocks.KINDS:
    raise _Damaged(f'stores {name} as {kind}, which is not read: {", ".join(blocks.KINDS)} are')
  count, size = blocks.layout(kind)
  if not all(shape) or shape[-1] % count:
    raise _Damaged(f'is damaged: {name} of shape {list(shape)} cannot be stored as {kind}, in blocks of {count}')
  total = size * (shape[-1] // count)
  for length in shape[:-1]: total *= length
  return Entry(shape, kind, begin, total)


def _placed(table: dict[str, Entry], cursor: _Cursor, metadata) -> dict[str, Entry]:
  """The table with places in the file. Tensors lie within it, aligned, and none in another."""
  alignment = metadata.get('general.alignment', 32)
  if not isinstance(alignment, int) or not 1 <= alignment <= 2 ** 20 or alignment & alignment - 1:
    raise _Damaged(f'is damaged: general.alignment = {alignment!r:.40} is no power of two')
  data = -(-cursor.at // alignment) * alignment
  placed = {}
  for name, entry in table.items():
    if entry.begin % alignment: raise _Damaged(f'is damaged: {quoted(name)} does not begin at a multiple of {alignment}')
    if entry.begin + entry.num_bytes > cursor.end - data:
      raise _Damaged(f'is damaged or cut short: {quoted(name)} lies past its end')
    placed[name] = dataclasses.replace(entry, begin=data + entry.begin)
  in_order = sorted(placed.items(), key=lambda item: item[1].begin)
  for (first, a), (second, b) in itertools.pairwise(in_order):
    if a.begin + a.num_bytes > b.begin: raise _Damaged(f'is damaged: {quoted(first)} and {quoted(second)} overlap')
  return placed
