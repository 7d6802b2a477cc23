"""What the commands share: how they read their words, and how each end becomes a line and an exit code.

A command is a module with absl flags, `main(overrides)` and, last, `commands.start(main, __doc__)`.
"""
import dataclasses
import difflib
import os
import re
import sys
from collections.abc import Callable
from typing import Any

from absl import flags

from efficient_lm.config import experiment
from efficient_lm.errors import (
  CheckpointError,
  ConfigError,
  DeviceFault,
  IncompatibleError,
  NonFinite,
  OtherProcess,
  Preempted,
  WriteError,
)
from efficient_lm.interop import folder
from efficient_lm.interop.gguf.source import Gguf, file_of
from efficient_lm.interop.huggingface import HuggingFace
from efficient_lm.models import spec
from efficient_lm.parallel import processes
from efficient_lm.runs import FromRun, mirror, writing
from efficient_lm.runs.allocator import use_huge_pages
from efficient_lm.system import interruption

FLAGS = flags.FLAGS
ROWS, LENGTH = 4, 1024   # of a model that no run here has trained
TOLD = (ConfigError, IncompatibleError, CheckpointError, NonFinite, OtherProcess, WriteError, DeviceFault, Preempted)
INTERRUPTED = 130   # what a shell reports of a program that SIGINT ended


def define_config():
  """Defines --config, for a command that reads one; words that start with --config. are its overrides."""
  flags.DEFINE_string('config', None, 'FILE.py or FILE.py:variant')


def load_config(overrides: list[str], workdir: str | None = None):
  """The experiment that --config and `overrides` describe, and the file's own; `workdir`: of the run. Raises ConfigError."""
  if not FLAGS.config: raise ConfigError('--config', FLAGS.config, 'is missing: write --config=configs/moe.py, say')
  return experiment.load(FLAGS.config, overrides, workdir)


def default_workdir() -> str:
  """runs/moe for configs/moe.py, runs/moe-olmoe_1b_7b for configs/moe.py:olmoe_1b_7b."""
  file, _, variant = FLAGS.config.partition(':')
  name = os.path.splitext(os.path.basename(file))[0]
  return os.path.join('runs', f'{name}-{variant}' if variant else name)


def define_processes():
  """Defines what says which of several processes this is, for a command that they perform together."""
  flags.DEFINE_string('coordinator', None, 'host:port where process 0 listens for the others')
  flags.DEFINE_integer('process_id', None, 'number of this process, from 0 on')
  flags.DEFINE_integer('num_processes', None, 'how many there are')
  flags.DEFINE_integer('coordinator_timeout', processes.PATIENCE, 'seconds until who does not answer is given up', 1)


def processes_around() -> processes.Group | None:
  """Those that this process is one of, or None. Raises ConfigError."""
  return processes.group_of(FLAGS.coordinator, FLAGS.process_id, FLAGS.num_processes)


def define_run():
  """Defines --run, --stage, --packed and --config, for a command that reads a trained model."""
  if 'run' in FLAGS: return
  flags.DEFINE_string('run', None, 'workdir of a training run, or its address; a Hugging Face folder, or a GGUF file')
  flags.DEFINE_integer('stage', None, 'number of a stage, for its model instead of that of the last')
  flags.DEFINE_boolean('packed', False, 'matrices of a GGUF file stay in the few bits that it stores')
  if 'config' not in FLAGS: define_config()


def run_source() -> FromRun | HuggingFace | Gguf:
  """What --run, --stage and --packed name, refused before anything heavy is loaded if it holds no model: the workdir of a
  run, a Hugging Face folder, by what its config.json says, or a GGUF file or a folder with one. Raises ConfigError."""
  if FLAGS.config: experiment.execute(FLAGS.config)
  if not FLAGS.run: raise ConfigError('--run', FLAGS.run, 'is missing: write --run=runs/moe, say')
  return source_of(mirror.local('--run', FLAGS.run), FLAGS.stage, FLAGS.packed)


def source_of(path: str, stage: int | None = None, packed: bool = False) -> FromRun | HuggingFace | Gguf:
  """What a path names, a stage where it is the workdir of a run, and whether a GGUF file's matrices stay as they are stored.
  Raises ConfigError."""
  kind = HuggingFace if folder.holds_model(path) else Gguf if file_of(path) else None
  if packed and kind is not Gguf: raise ConfigError('--packed', packed, 'must be left out: it is for GGUF files')
  if kind is None:
    source = FromRun(path=path, stage=stage)
    for field, value, fix in source.check(): raise ConfigError(f'--{"run" if field == "path" else field}', value, fix)
    experiment.read(path)
    return source
  if stage is not None: raise ConfigError('--stage', stage, 'must be left out: only runs have stages')
  source = Gguf(path=path, packed=packed) if kind is Gguf else kind(path=path)
  source.spec()
  return source


def trained_as(source) -> tuple[Any, int, int]:
  """How a source is measured: the experiment of a run, or None, and how many texts of how many tokens are read at once:
  those of its training, or ROWS of what the model was made for, LENGTH at most."""
  if not isinstance(source, FromRun): return None, ROWS, min(LENGTH, source.context)
  trained = experiment.read(source.path)
  return trained, trained.train.batch_size // trained.train.accumulate, trained.train.sequence_length


def define_text():
  """Defines --text, for a command that reads text beside that of a run."""
  if 'text' not in FLAGS: flags.DEFINE_string('text', None, 'text file')


def define_out():
  """Defines --out, for a command that writes into a folder of its own."""
  if 'out' not in FLAGS: flags.DEFINE_string('out', None, 'folder')


def check_text(source):
  """Raises ConfigError where --text is no file, or missing for a source that has no text."""
  if FLAGS.text is None and isinstance(source, FromRun): return
  if FLAGS.text is None: raise ConfigError('--text', None, f'is missing: {source.label} has no text of its own')
  if not os.path.isfile(FLAGS.text): raise ConfigError('--text', FLAGS.text, 'there is no such file')


def text_batches(source):
  """Batches of the file --text, cut into rows as `trained_as` says. Raises ConfigError as `text_stream` does."""
  from efficient_lm.data.packing import Rows
  from efficient_lm.data.pipeline import in_sequence
  _, rows, length = trained_as(source)
  return in_sequence(Rows(text_stream(source.tokenizer()), length), batch_size=rows)


def text_stream(tokenizer):
  """The tokens of the file --text (`data.packing.Stream`): of a text, or of a .npy file the ids that it holds, each row of
  them a document without marks. Raises ConfigError for one that has nothing to predict or cannot be used."""
  from efficient_lm.data.packing import pack
  if FLAGS.text.endswith('.npy'): stream = _stream_of_ids(tokenizer)
  else:
    with open(FLAGS.text, 'rb') as file: content = file.read()
    try: stream = pack(tokenizer, [content])
    except ValueError as error: raise ConfigError('--text', FLAGS.text, str(error)) from error
  if stream.num_targets < 1 or not stream.bytes_V[stream.tokens].any():
    raise ConfigError('--text', FLAGS.text, 'holds nothing to predict')
  return stream


def _stream_of_ids(tokenizer):
  import numpy as np

  from efficient_lm.data.packing import Stream
  try: ids = np.load(FLAGS.text)
  except (ValueError, OSError) as error: raise ConfigError('--text', FLAGS.text, f'is no array: {error}') from error
  size = tokenizer.vocab_size
  if ids.ndim not in (1, 2) or not np.issubdtype(ids.dtype, np.integer) or ((ids < 0) | (ids >= size)).any():
    raise ConfigError('--text', FLAGS.text, f'must hold rows of ids, whole numbers from 0 to {size - 1}')
  rows, length = np.atleast_2d(ids).shape
  return Stream(ids.reshape(-1), np.arange(rows, dtype=np.int64) * length, tokenizer.bytes_V)


def define_cache():
  """Defines --cache and --cache_group, for a command that decodes."""
  if 'cache' in FLAGS: return
  flags.DEFINE_string('cache', None, 'format of keys and values')
  flags.DEFINE_integer('cache_group', None, 'tokens that share a scale')


def cache_format():
  """The format that --cache (by default float) and --cache_group describe. Raises ConfigError."""
  name, group = FLAGS.cache or 'float', FLAGS.cache_group
  if name not in spec.CACHES: raise ConfigError('--cache', name, f'must be one of {", ".join(spec.CACHES)}')
  form = spec.CACHES[name]
  if group is None: return form
  if not hasattr(form, 'group'):
    raise ConfigError('--cache_group', group, f'is not for --cache={name}, which has no scales')
  form = dataclasses.replace(form, group=group)
  for _, value, fix in form.check(): raise ConfigError('--cache_group', value, fix)
  return form


def start(main: Callable[[list[str]], None], doc: str):
  """Runs a command on the words it was called with, and leaves the process with its exit code."""
  if {'--help', '-h', '--helpfull', '--helpshort'} & set(sys.argv):
    print(doc.strip())
    sys.exit(0)
  use_huge_pages()   # now, before anything heavy is loaded
  interruption.let_through()
  sys.exit(interruption.ends_with(exit_code(main, sys.argv)))


def exit_code(main: Callable[[list[str]], None], argv: list[str]) -> int:
  """Runs a command; what a user can mend is one line on stderr, any other exception a bug with its traceback."""
  try:
    with interruption.caught(): main(_parse(argv))
    if sys.stdout is not None: sys.stdout.flush()
    return 0
  except TOLD as error:
    print(' '.join(str(error).split()), file=sys.stderr)
    return error.exit_code
  except BrokenPipeError:   # who was reading has seen enough, as `head` does
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())   # or Python would say so once more at its end
    return 0
  except OSError as error:
    if error.errno not in writing.OF_DISKS: raise
    print(f'a file cannot be written: {writing.reason(error)}{writing.free(error.filename or os.getcwd())}', file=sys.stderr)
    return WriteError.exit_code
  except KeyboardInterrupt:
    print('interrupted', file=sys.stderr)
    return INTERRUPTED


def _parse(argv: list[str]) -> list[str]:
  """Sets absl's flags and returns the overrides. Raises ConfigError for any word that is neither."""
  is_override = [('config' in FLAGS) and bool(re.match('--?config[.]', word)) for word in argv]
  try:
    left = FLAGS([word for word, override in zip(argv, is_override, strict=True) if not override])[1:]
  except flags.UnrecognizedFlagError as error:
    raise ConfigError(f'--{error.flagname}', error.flagvalue, f'no such flag; {_known(error.flagname)}') from error
  except flags.Error as error:
    raise ConfigError('arguments', argv[1:], str(error)) from error
  if left:
    meant = f'did you mean --{left[0].lstrip("-")}? ' if '=' in left[0] else ''
    raise ConfigError('arguments', left[0], f'is not a flag; {meant}write --name=value, with dashes and equals sign')
  return ['--' + word.lstrip('-') for word, override in zip(argv, is_override, strict=True) if override]


def _known(name: str) -> str:
  """The flag that was likely meant, and all those of the command."""
  modules = FLAGS.flags_by_module_dict().items()
  known = [flag.name for module, own in modules if not module.startswith('absl') for flag in own]
  close = difflib.get_close_matches(name.split('.')[0], known, 1)
  hint = f'did you mean --{name.replace(name.split(".")[0], close[0], 1)}? ' if close else ''
  return f'{hint}there are {", ".join("--" + flag for flag in known)}' + ', --config.FIELD' * ('config' in known)
