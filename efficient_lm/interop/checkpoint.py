"""What a folder or a file of somebody else holds, before any of it is read: a config and named tensors.

Every reader of files (`safetensors.py`, and whatever adapts another format) gives a Checkpoint in the words of Hugging Face:
the config spelled as a config.json, tensors under the names and in the orientation, (outputs, inputs), that transformers
writes. Families, loading and all that follows are one code for all of them.
"""
import dataclasses
import mmap
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np


def let_go(mapped: mmap.mmap, begin: int, end: int):
  """Of the bytes from begin to end of a mapped file, which are read again where they are needed. Until then its pages count
  as memory of the process for as long as nobody else needs it: a second model's worth."""
  first = begin // mmap.PAGESIZE * mmap.PAGESIZE
  if hasattr(mmap, 'MADV_DONTNEED') and end > begin: mapped.madvise(mmap.MADV_DONTNEED, first, end - first)


@dataclasses.dataclass(frozen=True)
class Packed:
  """A matrix (O, I) in few bits, not yet read: `fetch` gives the `formats.Encoded` of some of its rows in numpy, values
  (O, bytes) and scales (I / group, O), of a format whose numbers are exactly those that the tensor dequantizes to."""
  format: Any
  fetch: Callable[[slice], Any] = dataclasses.field(repr=False)


@dataclasses.dataclass(frozen=True)
class Tensor:
  """One tensor, not yet read. `dtype` is numpy's or ml_dtypes' (bfloat16, float8); `fetch` gives its array, a view of a
  mapped file where the file allows it, of exactly this shape and dtype. `packed`: as the file stores it, where that is in
  few bits and a format here says the same. `release`: lets go of what of a mapped file is in memory; the next read has it
  again."""
  shape: tuple[int, ...]
  dtype: np.dtype
  fetch: Callable[[], np.ndarray] = dataclasses.field(repr=False)
  packed: Packed | None = None
  release: Callable[[], None] = dataclasses.field(default=lambda: None, repr=False)

  @classmethod
  def of(cls, array) -> 'Tensor':
    """A tensor that is in memory already."""
    array = np.asarray(array)
    return cls(array.shape, array.dtype, lambda: array)

  def read(self) -> np.ndarray:
    """The array. Read only: it may be a view of a file."""
    return self.fetch()


@dataclasses.dataclass(frozen=True)
class Checkpoint:
  """config: as a config.json; tensors: by name, in the order of the file. `where` names the folder or file in messages."""
  config: Mapping[str, Any]
  tensors: Mapping[str, Tensor]
  where: str = 'checkpoint'
