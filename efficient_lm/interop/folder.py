"""A folder as Hugging Face's hub has it: config.json and the tensors of model.safetensors or of its shards."""
import os
from collections.abc import Iterator

from efficient_lm.errors import CheckpointError, ConfigError
from efficient_lm.interop import safetensors
from efficient_lm.interop.checkpoint import Checkpoint, Tensor

CONFIG, WEIGHTS, INDEX = 'config.json', 'model.safetensors', 'model.safetensors.index.json'
LARGEST_JSON = 256 << 20   # bytes; the index of a checkpoint of 700B parameters has 9 MB, the largest tokenizers 40
# Folders of other kinds, by a file in them, and what makes one of ours of them.
OTHERS = {'pytorch_model.bin': 'has weights as pickled Python, which can run code: save it again as safetensors',
          'pytorch_model.bin.index.json': 'has weights as pickled Python, which can run code: save it again as safetensors',
          'adapter_config.json': 'is an adapter: merge it into its base model and save that'}


def read(path: str) -> Checkpoint:
  """The checkpoint in a folder, none of its tensors read. Raises ConfigError where there is none, CheckpointError where it
  is damaged: one line that names the file."""
  config, tensors = config_of(path), {}
  for name, names in shards(path).items():
    tensors |= _shard(os.path.join(path, name), names)
  return Checkpoint(config, tensors, path)


def holds_model(path: str) -> bool:
  """Whether a folder has a config.json in the words of Hugging Face, and not that of a run."""
  try: return 'model_type' in config_of(path)
  except (ConfigError, CheckpointError): return False


def config_of(path: str) -> dict:
  """config.json. Raises ConfigError, CheckpointError."""
  if not os.path.isdir(path): raise ConfigError('path', path, 'is no folder')
  file = os.path.join(path, CONFIG)
  if not os.path.isfile(file): raise ConfigError('path', path, _other(path) or f'holds no {CONFIG}')
  return json_of(file)


def shards(path: str) -> dict[str, list[str] | None]:
  """The names of the files of tensors in a folder, and what each should hold (None: not said). Raises ConfigError,
  CheckpointError."""
  index = os.path.join(path, INDEX)
  if os.path.isfile(os.path.join(path, WEIGHTS)): return {WEIGHTS: None}
  if not os.path.isfile(index): raise ConfigError('path', path, _other(path) or f'holds neither {WEIGHTS} nor {INDEX}')
  weight_map, found = json_of(index).get('weight_map'), {}
  if not isinstance(weight_map, dict) or not weight_map: raise CheckpointError(f'{index} has no weight_map')
  for tensor, name in weight_map.items():
    if not _is_plain(name): raise CheckpointError(f'{index}: {name!r}, of {tensor!r}, is not the name of a file beside it')
    found.setdefault(name, []).append(tensor)
  missing = [name for name in found if not os.path.isfile(os.path.join(path, name))]
  if missing: raise CheckpointError(f'{os.path.join(path, missing[0])} is missing: {len(missing)} of the {len(found)} files '
                                    f'that {INDEX} names')
  return found


def json_of(file: str) -> dict:
  """A file with a JSON object. Raises CheckpointError."""
  try:
    if os.path.getsize(file) > LARGEST_JSON: raise CheckpointError(f'{file} has more than {LARGEST_JSON} bytes')
    with open(file, 'rb') as opened: found = safetensors.parse(opened.read())
  except (OSError, ValueError) as error: raise CheckpointError(f'{file} cannot be read: {error}') from error
  if not isinstance(found, dict): raise CheckpointError(f'{file} holds no JSON object')
  return found


def samples(path: str, length: int = 4096) -> Iterator[bytes]:
  """What tells a checkpoint from another without reading all of it: of each tensor its name, dtype and shape, and the first
  and last `length` bytes. A training or merge that leaves both ends of every tensor as they were would not be seen."""
  for name, tensor in sorted(read(path).tensors.items()):
    yield f'{name} {tensor.dtype} {tensor.shape}'.encode()
    raw = tensor.read().reshape(-1).view('uint8')
    yield raw[:length].tobytes()
    yield raw[-length:].tobytes()


def _shard(file: str, names: list[str] | None) -> dict[str, Tensor]:
  """The tensors of one file, which must be those that the index gives it."""
  tensors = safetensors.read(file)
  if names is None: return tensors
  different = sorted(set(names) ^ set(tensors))
  if different:
    raise CheckpointError(f'{file} and {INDEX} differ in what the file holds: {_first(different)}')
  return tensors


def _first(names: list[str], n: int = 5) -> str:
  return ', '.join(names[:n]) + (f' and {len(names) - n} more' if len(names) > n else '')


def _is_plain(name) -> bool:
  """Whether it names a file of tensors in the folder itself."""
  return (isinstance(name, str) and len(name) < 256 and name.endswith('.safetensors') and not name.startswith('.')
          and not set(name) & set('/\\\0:'))


def _other(path: str) -> str:
  return next((fix for file, fix in OTHERS.items() if os.path.isfile(os.path.join(path, file))), '')
