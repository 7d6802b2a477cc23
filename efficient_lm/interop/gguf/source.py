"""A GGUF file as a source (`config.sources`): one file with the model, its config and its tokenizer."""
import dataclasses
import hashlib
import os

from efficient_lm.errors import ConfigError
from efficient_lm.interop.gguf import names, reader, vocabulary
from efficient_lm.interop.imported import Imported
from efficient_lm.models.added import added

SAMPLE = 4096   # bytes


@dataclasses.dataclass(kw_only=True)
class Gguf(Imported):
  """The model in the file `path`, or in the only GGUF file of a folder. `dtype`: of the computation (None: float32).
  `parameters`: dtype that its arrays are held in (None: that of the file; float32 for blocks, which are dequantized). A run
  that trains it should hold them in 'float32': the small steps of an optimizer are lost in 16 bits. `packed`: whether
  matrices in Q8_0, Q4_0, Q4_1 and MXFP4 stay as they are stored, and frozen; the same numbers in an eighth to a quarter of
  the memory. Other blocks are dequantized still."""
  packed: bool = added(False)

  place = 'a .gguf file'

  @property
  def label(self) -> str:
    """What it is called in files and messages."""
    return ', '.join([super().label, *['as stored'] * self.packed])

  @property
  def here(self) -> bool:
    """Whether it can be read."""
    return file_of(self.path) is not None

  @property
  def file(self) -> reader.File:
    """Raises ConfigError where there is none, CheckpointError for one that is damaged."""
    found = file_of(self.path)
    if found is None: raise ConfigError('path', self.path, 'is neither a GGUF file nor a folder with one')
    return reader.read(found)

  def config(self):
    """As Imported. Raises CheckpointError for a damaged file, IncompatibleError for a model that is not understood."""
    file = self.file
    return names.checkpoint(file).config, file.path

  def checkpoint(self):
    """As Imported."""
    return names.checkpoint(self.file)

  def abstract(self):
    """As Imported."""
    if not self.packed: return super().abstract()
    from efficient_lm.interop import packed
    return packed.abstract(self.spec(), self.checkpoint(), self.parameters)

  def load(self, mesh=None):
    """As Imported."""
    if not self.packed: return super().load(mesh)
    from efficient_lm.interop import packed
    return packed.load(self.spec(), self.checkpoint(), mesh, self.parameters)

  def tokenizer(self):
    """Raises IncompatibleError for one that is not understood."""
    return vocabulary.tokenizer(self.file)

  def key(self) -> str:
    """A hash of the metadata, the table of tensors, how this source holds them, and the first and last bytes of each. Where
    the file lies is no part of it."""
    held = f'{self.dtype} {self.parameters}{" packed" * self.packed}'   # as it was before there was `packed`
    digest, file = hashlib.sha256(held.encode()), self.file
    digest.update(file.head())
    for name in file.tensors:
      raw = file.bytes_of(name)
      digest.update(raw[:SAMPLE].tobytes())
      digest.update(raw[-SAMPLE:].tobytes())
    return digest.hexdigest()


def file_of(path: str) -> str | None:
  """The GGUF file that `path` is, or the only one in the folder that it is."""
  if os.path.isfile(path): return path if is_gguf(path) else None
  if not os.path.isdir(path): return None
  found = sorted(name for name in os.listdir(path) if name.endswith('.gguf'))
  return os.path.join(path, found[0]) if len(found) == 1 else None


def is_gguf(path: str) -> bool:
  """By its name, or by how it begins: caches store files under other names."""
  if path.endswith('.gguf'): return True
  try:
    with open(path, 'rb') as file: return file.read(4) == b'GGUF'
  except OSError: return False
