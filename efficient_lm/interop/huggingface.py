"""A Hugging Face folder as a source (`config.sources`): config.json, safetensors and tokenizer.json, already on disk."""
import dataclasses
import hashlib
import os

from efficient_lm.interop import folder, fp8
from efficient_lm.interop.imported import Imported

IDENTITY = (folder.CONFIG, 'tokenizer.json', 'tokenizer_config.json', 'special_tokens_map.json', 'generation_config.json')


@dataclasses.dataclass(kw_only=True)
class HuggingFace(Imported):
  """The model in the folder `path`. `dtype`: of the computation (None: the one that config.json names). `parameters`: dtype
  that its arrays are held in (None: as they are stored). A run that trains it should hold them in 'float32': the small steps
  of an optimizer are lost in bfloat16."""

  place = 'a folder with a config.json and safetensors'

  @property
  def here(self) -> bool:
    """Whether it can be read."""
    return os.path.isfile(os.path.join(self.path, folder.CONFIG))

  def config(self):
    """As Imported. Raises ConfigError for a config.json that is not there."""
    return fp8.without(folder.config_of(self.path)), os.path.join(self.path, folder.CONFIG)

  def checkpoint(self):
    """As Imported; blocks of float8 dequantized."""
    return fp8.dequantized(folder.read(self.path))

  def tokenizer(self):
    """Raises ConfigError where the folder has none that can be used."""
    from efficient_lm.interop import vocabulary
    return vocabulary.read(self.path)

  def key(self) -> str:
    """A hash of config.json, of the files of the tokenizer, of how this source holds it, and of what `folder.samples` reads
    of each tensor. Where the folder lies is no part of it."""
    digest = hashlib.sha256(f'{self.dtype} {self.parameters}'.encode())
    for name in IDENTITY:
      file = os.path.join(self.path, name)
      if os.path.isfile(file):
        with open(file, 'rb') as opened: _add(digest, name.encode(), opened.read())
    for piece in folder.samples(self.path): _add(digest, piece)
    return digest.hexdigest()


def _add(digest, *pieces: bytes):
  """Each with its length, so that no two sequences of pieces are one."""
  for piece in pieces: digest.update(len(piece).to_bytes(8, 'little') + piece)
