"""A Hugging Face folder as a source (`config.sources`): config.json, safetensors and tokenizer.json, already on disk."""
import dataclasses
import hashlib
import os

from efficient_lm.interop import families, folder, fp8

DTYPES = (None, 'float32', 'bfloat16', 'float16')
IDENTITY = (folder.CONFIG, 'tokenizer.json', 'tokenizer_config.json', 'special_tokens_map.json', 'generation_config.json')


@dataclasses.dataclass(kw_only=True)
class HuggingFace:
  """The model in the folder `path`. `dtype`: of the computation (None: the one that config.json names). `parameters`: dtype
  that its arrays are held in (None: as they are stored). A run that trains it should hold them in 'float32': the small steps
  of an optimizer are lost in bfloat16."""
  path: str
  dtype: str | None = None
  parameters: str | None = None

  def check(self):
    if not self.path: yield 'path', self.path, 'must name a folder with a config.json and safetensors'
    for field in ('dtype', 'parameters'):
      value = getattr(self, field)
      if value not in DTYPES: yield field, value, 'must be float32, bfloat16 or float16, or None'

  @property
  def label(self) -> str:
    """What it is called in files and messages."""
    held = [f'{field} {value}' for field, value in (('computed in', self.dtype), ('held in', self.parameters)) if value]
    return ', '.join([self.path, *held])

  @property
  def here(self) -> bool:
    """Whether it can be read."""
    return os.path.isfile(os.path.join(self.path, folder.CONFIG))

  @property
  def context(self) -> int:
    """Tokens of a text that the model was made for. Raises ConfigError."""
    config = folder.config_of(self.path)
    found = config.get('n_positions') or config.get('max_position_embeddings')
    return found if isinstance(found, int) and found > 0 else 2048

  def spec(self):
    """Raises ConfigError for a config.json that is not there, or says what no model here does."""
    config = fp8.without(folder.config_of(self.path))
    model = families.spec_of(config, os.path.join(self.path, folder.CONFIG))
    return model if self.dtype is None else dataclasses.replace(model, dtype=self.dtype)

  def abstract(self):
    """Raises ConfigError as `spec` does, CheckpointError for tensors that are damaged, or not those of the config."""
    from efficient_lm.interop import load
    return load.abstract(self.spec(), self._checkpoint(), self.parameters)

  def load(self, mesh=None):
    """On `mesh` (default: on one device). Raises as `abstract` does."""
    from efficient_lm.interop import load
    return load.load(self.spec(), self._checkpoint(), mesh, self.parameters)

  def _checkpoint(self):
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
