"""What is written is read, value for value and byte for byte, or there is no file."""
import ml_dtypes
import numpy as np
import pytest

from efficient_lm.interop.gguf import binary, reader
from efficient_lm.interop.gguf.binary import Line

METADATA = {'general.architecture': 'llama', 'a.text': 'é 漢', 'a.yes': True, 'a.no': False, 'a.count': 2 ** 32 - 1,
            'a.float': 0.5, 'a.words': ['x', '', '漢'], 'a.none': [], 'a.ids': np.array([-1, 2], np.int32),
            'a.scores': np.array([0.5, -1.0], np.float32)}


def line(array: np.ndarray, kind: str) -> Line:
  return Line(array.shape, kind, lambda: array)


def test_values_and_tensors_come_back(tmp_path):
  """Tensors of sizes that leave gaps behind them."""
  rng = np.random.default_rng(0)
  arrays = {'a': (rng.normal(size=(3, 5)).astype(np.float32), 'F32'), 'b': (rng.normal(size=7).astype(np.float16), 'F16'),
            'c': (rng.normal(size=(2, 3, 3)).astype(ml_dtypes.bfloat16), 'BF16')}
  raw = rng.integers(0, 60, (5, 2 * 34)).astype(np.uint8)
  path = tmp_path / 'file.gguf'
  binary.write(str(path), METADATA, {name: line(*pair) for name, pair in arrays.items()} | {
    'blocks': Line((5, 64), 'Q8_0', lambda: raw)})
  found = reader.read(path)
  assert set(found.metadata) == set(METADATA)
  for key, value in METADATA.items(): np.testing.assert_array_equal(found.metadata[key], value)
  for name, (array, kind) in arrays.items():
    assert found.tensors[name].kind == kind and found.numbers(name).dtype == array.dtype
    np.testing.assert_array_equal(found.numbers(name), array)
  np.testing.assert_array_equal(found.bytes_of('blocks'), raw.reshape(-1))


def test_a_file_that_fails_on_the_way_is_not_there_and_the_old_one_is(tmp_path):
  path = tmp_path / 'file.gguf'
  path.write_text('before')

  def fail(): raise OSError('no space')
  with pytest.raises(OSError, match='no space'): binary.write(str(path), METADATA, {'a': Line((3,), 'F32', fail)})
  with pytest.raises(RuntimeError, match='8 bytes, not 12'):
    binary.write(str(path), METADATA, {'a': Line((3,), 'F32', lambda: np.zeros(2, np.float32))})
  assert [one.name for one in tmp_path.iterdir()] == ['file.gguf'] and path.read_text() == 'before'
