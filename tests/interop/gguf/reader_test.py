"""A file is read as it was written, or refused in a line that names it: never a traceback, a hang, a large allocation."""
import os
import struct
import tracemalloc

import numpy as np
import pytest

from efficient_lm.errors import CheckpointError, IncompatibleError
from efficient_lm.interop.gguf import names, reader, vocabulary
from tests.interop.gguf import writing
from tests.interop.gguf.models import LLAMA, small
from tests.interop.gguf.writing import head, key, line

NUMBERS = np.arange(12, dtype=np.float32).reshape(3, 4)


def written(tmp_path, raw: bytes, name='model.gguf') -> str:
  path = tmp_path / name
  path.write_bytes(raw)
  return str(path)


@pytest.mark.parametrize('version', [2, 3])
def test_what_was_written_is_read(tmp_path, version):
  metadata = {'general.architecture': 'llama', 'a': ('u8', 200), 'b': ('i8', -3), 'c': ('u16', 60000), 'd': ('i16', -300),
              'e': ('u32', 2 ** 32 - 1), 'f': ('i32', -7), 'g': 0.5, 'h': True, 'i': ('u64', 2 ** 63),
              'j': ('i64', -2 ** 62), 'k': ('f64', 1 / 3), 'words': ['', 'é', 'x' * 300], 'ints': [1, 2, 3],
              'none': [], 'flags': [True, False]}
  half = ('F16', (2, 3), np.arange(6, dtype=np.float16).tobytes())
  quantized = ('Q8_0', (2, 32), (np.float16(2).tobytes() + bytes(range(32))) * 2)
  path = written(tmp_path, writing.file(metadata, {'n': NUMBERS, 'h': half, 'q': quantized}, version))
  file = reader.read(path)
  wanted = {name: one[1] if isinstance(one, tuple) else one for name, one in metadata.items()}
  assert {name: one.tolist() if isinstance(one, np.ndarray) else one for name, one in file.metadata.items()} == wanted
  np.testing.assert_array_equal(file.numbers('n'), NUMBERS)
  np.testing.assert_array_equal(file.numbers('n', 1), NUMBERS[1])
  np.testing.assert_array_equal(file.numbers('h'), np.arange(6, dtype=np.float16).reshape(2, 3))
  np.testing.assert_array_equal(file.numbers('q'), np.tile(2 * np.arange(32, dtype=np.float32), (2, 1)))
  np.testing.assert_array_equal(file.numbers('q', 1), 2 * np.arange(32, dtype=np.float32))


@pytest.mark.parametrize('alignment', [1, 8, 64, 4096])
def test_data_begins_where_the_file_says_it_is_aligned(tmp_path, alignment):
  path = written(tmp_path, writing.file({'general.alignment': alignment}, {'a': NUMBERS[0], 'b': NUMBERS}))
  np.testing.assert_array_equal(reader.read(path).numbers('b'), NUMBERS)


def test_numbers_are_mapped_and_not_copied(tmp_path):
  raw = writing.file({}, {'big': np.zeros((1024, 1024), np.float32)})
  path = written(tmp_path, raw)
  tracemalloc.start()
  found = reader.read(path).numbers('big')
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert found.shape == (1024, 1024) and not found.flags.writeable and peak < 2 ** 18


def one(*keys: bytes) -> bytes:
  return head(0, len(keys)) + b''.join(keys)


def table(*lines: bytes, data: bytes = bytes(64)) -> bytes:
  begin = head(len(lines), 0) + b''.join(lines)
  return begin + bytes(-len(begin) % 32) + data


LONG = 2 ** 63
HOSTILE = {
  'nothing': b'', 'three letters': b'GGU', 'another format': b'PK\x03\x04' + bytes(100), 'magic alone': b'GGUF',
  'version 0': head(0, 0, 0), 'version 1': head(0, 0, 1), 'version 4': head(0, 0, 4),
  'the other byte order': head(0, 0, 3 << 24),
  'no counts': head(0, 0)[:8], 'more tensors than bytes': head(LONG, 0), 'more keys than bytes': head(0, LONG),
  'all counts at their largest': head(2 ** 64 - 1, 2 ** 64 - 1), 'more keys than read': head(0, 70_000) + bytes(2 ** 20),
  'more tensors than read': head(70_000, 0) + bytes(2 ** 21), 'a key that is not there': head(0, 1) + bytes(4),
  'a name longer than the file': head(0, 1) + struct.pack('<Q', LONG) + bytes(32),
  'a name longer than names are': head(0, 1) + struct.pack('<Q', 2 ** 17) + bytes(2 ** 18),
  'a name that is no text': one(writing.text(b'\xff\xfe') + writing.value(1)),
  'a key twice': one(key('a', 1), key('a', 1)),
  'a type that does not exist': one(writing.text('a') + struct.pack('<IQQ', 13, 0, 0)),
  'a type far off': one(writing.text('a') + struct.pack('<IQQ', 2 ** 32 - 1, 0, 0)),
  'a string longer than the file': one(writing.text('a') + struct.pack('<IQ', 8, LONG)),
  'a string that is no text': one(writing.text('a') + struct.pack('<I', 8) + writing.text(b'a\xc3')),
  'an array longer than the file': one(writing.text('a') + struct.pack('<IIQ', 9, 4, LONG)),
  'an array whose bytes overflow': one(writing.text('a') + struct.pack('<IIQ', 9, 10, 2 ** 61)),
  'strings without end': one(writing.text('a') + struct.pack('<IIQ', 9, 8, 2 ** 40) + bytes(64)),
  'an array cut short': one(writing.text('a') + struct.pack('<IIQ', 9, 4, 9) + bytes(32)),
  'an array of arrays': one(writing.text('a') + struct.pack('<IIQ', 9, 9, 1) * 3),
  'an array of nothing known': one(writing.text('a') + struct.pack('<IIQQ', 9, 77, 1, 0)),
  'a bool of two': one(writing.text('a') + struct.pack('<IBI', 7, 2, 0)),
  'bools of two': one(writing.text('a') + struct.pack('<IIQBB', 9, 7, 2, 1, 2)),
  'alignment 0': one(key('general.alignment', 0)), 'alignment 3': one(key('general.alignment', 3)),
  'alignment 2 ** 31': one(key('general.alignment', 2 ** 31)),
  'alignment in words': one(key('general.alignment', 'x' * 500)),
  'alignment in numbers': one(key('general.alignment', [32, 32])), 'alignment true': one(key('general.alignment', 0.5)),
  'no dimensions': table(line('a', (), 0, 0)), 'five dimensions': table(line('a', (1, 1, 1, 1, 2), 0, 0)),
  'dimensions without end': head(1, 0) + writing.text('a') + struct.pack('<I', 2 ** 32 - 1) + bytes(64),
  'a dimension of 0': table(line('a', (3, 0), 0, 0)), 'a dimension of 2 ** 63': table(line('a', (LONG,), 0, 0)),
  'dimensions whose product overflows': table(line('a', (2 ** 32, 2 ** 32), 0, 0)),
  'four dimensions whose product overflows': table(line('a', (2 ** 16,) * 4, 0, 0)),
  'a kind that is not read': table(line('a', (32,), 20, 0)), 'a kind that is gone': table(line('a', (32,), 4, 0)),
  'a kind that does not exist': table(line('a', (32,), 10 ** 9, 0)),
  'a row of half a block': table(line('a', (2, 16), 8, 0)),
  'an offset past the end': table(line('a', (4,), 0, 2 ** 20)),
  'an offset that overflows': table(line('a', (4,), 0, 2 ** 64 - 32)),
  'an offset between': table(line('a', (4,), 0, 4)), 'the end past the end': table(line('a', (17,), 0, 0)),
  'a tensor twice': table(line('a', (4,), 0, 0), line('a', (4,), 0, 32)),
  'a tensor in another': table(line('a', (16,), 0, 0), line('b', (4,), 0, 32)),
  'two tensors in one place': table(line('a', (4,), 0, 0), line('b', (4,), 0, 0)),
  'no data': table(line('a', (4,), 0, 0), data=b''),
  'a table cut short': table(line('a', (4,), 0, 0), data=b'')[:-24],
  'a name of controls': table(line('\n\r\x1b[2J', (4,), 20, 0)),
  'a name of a page': table(line('é' * 30_000, (4,), 20, 0)),
}


def refusal(path: str, read=reader.read) -> str:
  """The one line with which a file is refused; at no time is more allocated than a few times the file."""
  tracemalloc.start()
  try:
    with pytest.raises((CheckpointError, IncompatibleError)) as refused: read(path)
    peak = tracemalloc.get_traced_memory()[1]
  finally: tracemalloc.stop()
  assert peak < 2 ** 20 + 8 * (os.path.getsize(path) if os.path.isfile(path) else 0)
  line = str(refused.value)
  assert line.startswith(path) and line.isprintable() and len(line) < len(path) + 400
  return line


@pytest.mark.parametrize('case', HOSTILE)
def test_a_hostile_file_is_refused_in_a_line(tmp_path, case):
  refusal(written(tmp_path, HOSTILE[case]))


def test_what_is_no_file_is_refused_without_waiting_for_it(tmp_path):
  os.mkfifo(tmp_path / 'pipe')
  refusal(str(tmp_path / 'pipe'))
  refusal(str(tmp_path))
  refusal(str(tmp_path / 'none'))


def test_refusals_say_what_is_wrong(tmp_path):
  wanted = {'another format': 'no GGUF file', 'version 1': 'version 1: 2 and 3 are read',
            'the other byte order': 'big-endian',
            'a kind that is not read': "'a' as IQ4_NL", 'a tensor in another': 'overlap', 'a key twice': "'a' twice"}
  for case, words in wanted.items(): assert words in refusal(written(tmp_path, HOSTILE[case])), case


WHOLE = writing.file(*small(LLAMA))


def understood(path):
  """All that is taken from a file before its numbers are."""
  file = reader.read(path)
  vocabulary.read(file)
  return names.checkpoint(file)


@pytest.mark.parametrize('part', range(1, 40))
def test_a_file_cut_anywhere_is_refused(tmp_path, part):
  refusal(written(tmp_path, WHOLE[:len(WHOLE) * part // 40]), understood)


@pytest.mark.parametrize('seed', range(40))
def test_a_file_with_changed_bytes_is_refused_or_is_another_file_that_can_be_read(tmp_path, seed):
  """Ten files a seed, of one to four changed bytes each, mostly in what is not numbers."""
  rng, refused = np.random.default_rng(seed), 0
  for i in range(10):
    raw = np.frombuffer(WHOLE, np.uint8).copy()
    places = rng.integers(0, min(len(raw), 3000), rng.integers(1, 5))
    raw[places] = rng.choice([0, 1, 8, 127, 128, 255], len(places)) if i % 2 else rng.integers(0, 256, len(places))
    path = written(tmp_path, raw.tobytes())
    try: tensors = understood(path).tensors
    except (CheckpointError, IncompatibleError) as error:
      assert str(error).startswith(path) and str(error).isprintable()
      refused += 1
      continue
    for tensor in tensors.values(): assert tensor.read().shape == tensor.shape
  assert refused >= 2, 'many changes are found'
