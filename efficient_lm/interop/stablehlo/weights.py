"""The arrays of a model in one file of the format safetensors, one array in memory at a time."""
import json

import numpy as np

from efficient_lm.interop.safetensors import DTYPES

KINDS = {dtype: kind for kind, dtype in DTYPES.items()}
BYTES = 'U8'   # what the format has no dtype for: numbers of 4 and 2 bits, a byte each, and rarer floats


def write(file: str, named) -> list[str]:
  """Writes (name, array) pairs in their order. Returns the dtype that the file gives each, in the format's words; an array
  of another dtype is its bytes, of shape (bytes,)."""
  kinds, header, end = [KINDS.get(np.dtype(array.dtype), BYTES) for _, array in named], {}, 0
  for (name, array), kind in zip(named, kinds):
    begin, end = end, end + array.size * np.dtype(array.dtype).itemsize
    shape = list(array.shape) if np.dtype(array.dtype) in KINDS else [end - begin]
    header[name] = {'dtype': kind, 'shape': shape, 'data_offsets': [begin, end]}
  text = json.dumps(header).encode()
  text += b' ' * (-len(text) % 8)   # tensors begin at a multiple of 8
  with open(file, 'wb') as opened:
    opened.write(len(text).to_bytes(8, 'little') + text)
    for _, array in named: opened.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
  return kinds
