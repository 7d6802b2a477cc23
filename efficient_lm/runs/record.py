"""What a run keeps beside its arrays, as plain files: what it began from, the stages that it has, and what each has left.

  run.json                     text, tokenizer and sources that the run began with; its stages, each with its key
  stages/<n>_<name>/<step>/    what a stage left: one commit, with its record in the manifest of the checkpoint

A stage's key is a hash of its settings and of the key of what it was given. What it left counts only as long as it carries
the key that the run's stages have now: a change upstream makes it again. Nothing here is heavy, and nothing needs a config.
"""
import dataclasses
import hashlib
import json
import os
import zlib
from pathlib import Path
from typing import Any

from efficient_lm.config import fields
from efficient_lm.config.experiment import RUN_JSON
from efficient_lm.config.sources import is_source
from efficient_lm.errors import CheckpointError
from efficient_lm.models.added import stored
from efficient_lm.runs import writing

BEGUN = 'begun.json'
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
  one that is damaged."""
  path = Path(workdir) / RUN_JSON
  if not path.is_file(): return None
  try:
    data = json.loads(path.read_text(encoding='utf-8'))
    return Record(data['text'], data['tokenizer'], data['start'], data['sources'],
                  tuple(Planned(**planned) for planned in data['plan']))
  except (ValueError, KeyError, TypeError) as error:
    raise CheckpointError(f'{path} is damaged: {type(error).__name__}: {error}') from error


def write(workdir, record: Record):
  """All or nothing."""
  replace(Path(workdir) / RUN_JSON, json.dumps(dataclasses.asdict(record), indent=2))


def replace(path: Path, text: str):
  """Writes a file beside `path` and renames it over it: what others read is whole, the old or the new. Raises WriteError."""
  beside = path.with_name(path.name + '.partial')
  with writing.needed(path):
    beside.write_text(text, encoding='utf-8')
    os.replace(beside, path)


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
  """The record of the newest commit in a stage's folder, or None: absent, or damaged."""
  folder = Path(folder)
  if not folder.is_dir(): return None
  steps = sorted((int(entry.name) for entry in folder.iterdir() if entry.name.isdecimal()), reverse=True)
  for step in steps:
    try:
      manifest = json.loads((folder / str(step) / MANIFEST).read_text(encoding='utf-8'))
      if manifest['record_crc32'] == crc32(manifest['record']): return manifest['record']
    except (OSError, ValueError, KeyError, TypeError): continue
  return None


def crc32(entries) -> int:
  """Of JSON."""
  return zlib.crc32(json.dumps(entries, sort_keys=True).encode())


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
  with writing.needed(folder):
    folder.parent.mkdir(exist_ok=True)   # a workdir that is gone is not made anew
    folder.mkdir(exist_ok=True)
  replace(folder / BEGUN, json.dumps({'course': course}))


def course(workdir, planned: Planned) -> str | None:
  """What a stage was made of when it was begun last, or None where it was not."""
  try: return json.loads((stage_folder(workdir, planned) / BEGUN).read_text(encoding='utf-8'))['course']
  except (OSError, ValueError, KeyError, TypeError): return None


def chosen(workdir, stage: int | None = None) -> Planned:
  """The stage whose model a run is asked for: its last one, or the one with this number. Raises CheckpointError where the
  run has no such stage, or has not come so far."""
  record = read(workdir)
  if record is None: raise CheckpointError(f'{workdir} has not begun: run it first')
  numbered = {int(planned.folder.partition('_')[0]): planned for planned in record.plan}
  if stage is not None and stage not in numbered:
    raise CheckpointError(f'{workdir} has no stage {stage}: its stages are {", ".join(one.name for one in record.plan)}')
  planned = record.plan[-1] if stage is None else numbered[stage]
  if committed(workdir, planned) is None:
    which = 'last stage' if stage is None else 'stage'
    raise CheckpointError(f'{workdir} has not come to its {which}, {planned.name}: run it again')
  return planned


def tokenizer(workdir):
  """The tokenizer that a run was trained with. Raises CheckpointError."""
  from efficient_lm.data import tokenizers
  path = Path(workdir) / 'tokenizer.json'
  if not path.is_file(): raise CheckpointError(f'{path} is missing: the run has not started training')
  return tokenizers.from_json(path.read_text())
