"""What a run keeps beside its arrays, as plain files: what it began from, the stages that it has, and what each has left.

  run.json                     text, tokenizer and sources that the run began with; its stages, each with its key
  stages/<n>_<name>/<step>/    what a stage left: one commit, with its record in the manifest of the checkpoint

A stage's key is a hash of its settings and of the key of what it was given. What it left counts only as long as it carries
the key that the run's stages have now: a change upstream makes it again. Nothing here is heavy, and nothing needs a config.
"""
import dataclasses
import hashlib
import json
import logging
import os
import re
import zlib
from pathlib import Path
from typing import Any

from efficient_lm.config import experiment as experiments
from efficient_lm.config import fields
from efficient_lm.config.experiment import CONFIG_JSON, RUN_JSON
from efficient_lm.config.sources import is_source
from efficient_lm.errors import CheckpointError, ConfigError
from efficient_lm.models.added import stored
from efficient_lm.runs import writing
from efficient_lm.system import sealed

log = logging.getLogger(__name__)
BEGUN, TOKENIZER = 'begun.json', 'tokenizer.json'
TEXT = {'name': str, 'tokenizer': str, 'hash': str, 'train_files': int, 'heldout_files': int, 'left_out': list}   # as shown
MANIFEST = os.path.join('manifest', 'metadata')   # of a checkpoint's step, as Orbax stores JSON


@dataclasses.dataclass(frozen=True)
class Planned:
  """A stage of a run: its folder under `stages`, its name for people, and the key of what it leaves."""
  folder: str
  name: str
  key: str


@dataclasses.dataclass(frozen=True)
class Record:
  """run.json. text: what the corpus was when the run began. tokenizer: its key. start: the source's path, key and
  description, or None. sources: keys of all others, by path as the config has it. plan: the stages."""
  text: dict[str, Any]
  tokenizer: str
  start: dict[str, Any] | None
  sources: dict[str, str]
  plan: tuple[Planned, ...]


def read(workdir) -> Record | None:
  """None where there is no run.json: the run has not begun, or was made by an earlier version. Raises CheckpointError for
  one that is damaged, or was there and is gone."""
  path = Path(workdir) / RUN_JSON
  if not path.is_file():
    begun = next(Path(workdir).glob(f'stages/*/{BEGUN}'), None)
    if begun is None: return None
    raise CheckpointError(f'{path} is missing, though there is a {begun}: bring it back, or move {begun.parent.parent} away')
  data = experiments.recorded(workdir)
  try:
    found = Record(data['text'], data['tokenizer'], data['start'], data['sources'],
                   tuple(Planned(**planned) for planned in data['plan']))
    _check(found)
    return found
  except (ValueError, KeyError, TypeError, AttributeError) as error: raise sealed.damaged(path, error) from error


def _check(found: Record):
  """Raises ValueError for what no run has written. (Start and sources have been looked at.)"""
  if not isinstance(found.tokenizer, str): raise ValueError('its tokenizer is no key')
  if not isinstance(found.text, dict): raise ValueError('its text is no object')
  for name, value in found.text.items():
    if not isinstance(value, TEXT.get(name, object)): raise ValueError(f'its text has {name} = {fields.brief(value)}')
  if not found.plan: raise ValueError('it has no stages')
  for planned in found.plan:
    if not all(isinstance(text, str) for text in (planned.folder, planned.name, planned.key)):
      raise ValueError('a stage has no folder, name and key')
    if not re.fullmatch(r'\d{1,9}_[^/\\\0]*', planned.folder) or not re.match(r'\d{1,9} ', planned.name):
      raise ValueError(f'{planned.folder!r}, {planned.name!r} names no stage')


def write(workdir, record: Record):
  """All or nothing."""
  with writing.needed(Path(workdir) / RUN_JSON): sealed.write(workdir, RUN_JSON, dataclasses.asdict(record))


# ------------------------------------------------------------------ keys

def key_of(*parts) -> str:
  """A hash of anything that JSON can hold."""
  return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def settings_of(stage, sources: dict[str, str], without: tuple[str, ...] = ()) -> Any:
  """A stage's settings as JSON, without those named, and with keys in place of where sources lie."""
  def plain(value):
    if is_source(value): return {'source': sources[value.label]}
    if isinstance(value, tuple): return [plain(one) for one in value]
    if not fields.is_config(value): return fields.to_json(value)
    return {'class': fields.name_of(type(value)), **{field.name: plain(getattr(value, field.name))
            for field in stored(value) if field.name not in without}}
  return plain(stage)


def stage_keys(stage, given: str, sources: dict[str, str]) -> tuple[str, str]:
  """The key of what a stage leaves, and that of its course: the same for one that only goes on for longer, as a training
  with more steps does, which may go on from what it has saved."""
  cosmetic, extends = getattr(stage, 'cosmetic', ()), getattr(stage, 'extends', ())
  return (key_of(settings_of(stage, sources, cosmetic), given),
          key_of(settings_of(stage, sources, cosmetic + extends), given))


# ------------------------------------------------------------------ what stages have left

def commit_record(folder) -> dict[str, Any] | None:
  """The record of the newest commit in a stage's folder, or None: absent, or damaged, of which a warning tells."""
  found, damage = _newest(Path(folder))
  if damage is not None: log.warning('%s; passed over', damage)
  return found


def _newest(folder: Path) -> tuple[dict[str, Any] | None, CheckpointError | None]:
  """The record of the newest commit that is whole, and what is wrong with a newer one."""
  if not folder.is_dir(): return None, None
  steps = [entry for entry in folder.iterdir() if entry.name.isdecimal() and entry.is_dir() and any(entry.iterdir())]
  damage = None
  for step in sorted(steps, key=lambda entry: int(entry.name), reverse=True):
    path = step / MANIFEST
    try:
      manifest = sealed.load(path)
      # Earlier versions have committed none.
      if 'record' in manifest or 'record_crc32' in manifest: return _record_in(manifest), damage
    except CheckpointError as error: damage = damage or error
    except (ValueError, KeyError, TypeError, RecursionError) as error: damage = damage or sealed.damaged(path, error)
  return None, damage


def _record_in(manifest) -> dict[str, Any]:
  """Of a commit. Raises ValueError, KeyError or TypeError for one that is not what was written."""
  found = manifest['record']
  if manifest['record_crc32'] != crc32(found): raise ValueError('it holds something else than was written')
  if not isinstance(found, dict): raise ValueError('its record is no object')
  return found


def crc32(entries) -> int:
  """Of JSON."""
  return zlib.crc32(json.dumps(entries, sort_keys=True).encode())


def bytes_on_disk(workdir, planned: Planned) -> int:
  """Of the arrays of the model that a stage has left, as they are stored. Raises CheckpointError."""
  folder, step = stage_folder(workdir, planned), committed(workdir, planned).get('step')
  if type(step) is not int: raise CheckpointError(f'{folder} is damaged: its record has no step')
  return sum(file.stat().st_size for file in (folder / str(step) / 'model').rglob('*') if file.is_file())


def stage_folder(workdir, planned: Planned) -> Path:
  """Where a stage keeps what it leaves."""
  return Path(workdir) / 'stages' / planned.folder


def committed(workdir, planned: Planned) -> dict[str, Any] | None:
  """The record of what a stage has left under its present key, or None."""
  record = commit_record(stage_folder(workdir, planned))
  return record if record is not None and record.get('key') == planned.key else None


def begin(workdir, planned: Planned, course: str):
  """Notes what a stage is about to be made of, beside what it saves while it goes."""
  folder = stage_folder(workdir, planned)
  with writing.needed(folder): sealed.write(workdir, f'stages/{planned.folder}/{BEGUN}', {'course': course})


def course(workdir, planned: Planned) -> str | None:
  """What a stage was made of when it was begun last, or None where it was not. Raises CheckpointError where that is damaged:
  what the stage has saved may be of other settings."""
  path = stage_folder(workdir, planned) / BEGUN
  if not path.is_file(): return None
  found = sealed.read(path).get('course')
  if not isinstance(found, str): raise sealed.damaged(path, ValueError('it names no course'))
  return found


def chosen(workdir, stage: int | None = None) -> Planned:
  """The stage whose model a run is asked for: its last one, or the one with this number. Raises CheckpointError where the
  run has no such stage, or has not come so far."""
  record = read(workdir)
  if record is None: raise CheckpointError(f'{workdir} has not begun: run it first')
  numbered = {int(planned.folder.partition('_')[0]): planned for planned in record.plan}
  if stage is not None and stage not in numbered:
    raise CheckpointError(f'{workdir} has no stage {stage}: its stages are {", ".join(one.name for one in record.plan)}')
  planned = record.plan[-1] if stage is None else numbered[stage]
  found, damage = _newest(stage_folder(workdir, planned))
  if damage is not None: raise CheckpointError(f'{damage}. Run it again: the stage is made anew')
  if found is None or found.get('key') != planned.key:
    which = 'last stage' if stage is None else 'stage'
    raise CheckpointError(f'{workdir} has not come to its {which}, {planned.name}: run it again')
  return planned


def left_spec(workdir, stage: int | None = None):
  """The description of the model that a run's last stage has left, or stage number `stage`; None where it has none, or has
  not come so far. Raises CheckpointError for one that is damaged."""
  known = read(workdir)
  numbered = {int(planned.folder.partition('_')[0]): planned for planned in known.plan} if known else {}
  planned = numbered.get(max(numbered, default=None) if stage is None else stage)
  found = committed(workdir, planned) if planned else None
  if found is None or found.get('spec') is None: return None
  return experiments.recorded_spec(str(stage_folder(workdir, planned)), found['spec'])


def tokenizer(workdir):
  """The tokenizer that a run was trained with. Raises CheckpointError where there is none, or another one."""
  from efficient_lm.data import tokenizers
  path = Path(workdir) / TOKENIZER
  if not path.is_file(): raise CheckpointError(f'{path} is missing: the run has not started training')
  try: found = tokenizers.from_json(json.dumps(sealed.read(path)))
  except ConfigError as error: raise sealed.damaged(path, error) from error
  known = read(workdir)
  if known is None: _check_size(workdir, path, found)
  elif known.tokenizer != found.key:
    raise CheckpointError(f'{path} is not the tokenizer that the run was trained with, by its {RUN_JSON}: bring that back')
  return found


def _check_size(workdir, path: Path, tokenizer):
  """Raises CheckpointError for the tokenizer of a run of an earlier version, which has not recorded its key, if the model
  does not have that many ids."""
  if not (Path(workdir) / CONFIG_JSON).is_file(): return
  model = experiments.read(str(workdir)).model
  if model is None or getattr(model, 'vocab_size', tokenizer.vocab_size) >= tokenizer.vocab_size: return
  raise CheckpointError(f'{path} has {tokenizer.vocab_size} ids, and the model of the run only {model.vocab_size}: bring '
                        'back the one that it was trained with')


def write_tokenizer(workdir, tokenizer):
  """Whole or not at all; `tokenizer` is its inverse."""
  saved = json.loads(tokenizer.to_json())
  with writing.needed(Path(workdir) / TOKENIZER): sealed.write(workdir, TOKENIZER, saved, indent=None)
