"""Checkpoints: Orbax writes and reshards the arrays; this file sees to it that only good ones are kept and loaded.

Orbax commits a step atomically (a temporary folder, renamed) but has no checksums, casts dtypes without a word, and takes
any folder with a number for a name as a checkpoint. So each step carries a manifest that is committed with it: path, dtype,
shape and digest of every leaf, and a record of whatever else belongs to it. Digests are taken on device from the live state,
and again from what was restored, on whatever mesh that is: a change anywhere in between is found.
"""
import asyncio
import concurrent.futures
import contextlib
import json
import logging
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jax.sharding import SingleDeviceSharding

from efficient_lm.errors import CheckpointError, ConfigError, NonFinite, WriteError
from efficient_lm.parallel.processes import is_first, on_first, several, together
from efficient_lm.parallel.replicas import digests
from efficient_lm.parallel.sharding import wait_on_cpu
from efficient_lm.runs import writing
from efficient_lm.runs.record import crc32
from efficient_lm.system import workdir as workdirs
from efficient_lm.tree import path_name

log = logging.getLogger(__name__)
FILES = 64   # that a step takes at most, beside those of a size that Orbax divides
SANE = 'sane.json'


class _Loop(asyncio.SelectorEventLoop):
  """A loop that takes late answers: after a write that failed, those of others that were under way come when it is closed,
  and TensorStore prints a traceback for each."""

  def call_soon_threadsafe(self, *arguments, **more):
    with contextlib.suppress(RuntimeError) if self.is_closed() else contextlib.nullcontext():
      return super().call_soon_threadsafe(*arguments, **more)


class _Loops(asyncio.DefaultEventLoopPolicy):
  def new_event_loop(self): return _Loop()


asyncio.set_event_loop_policy(_Loops())
# What goes wrong in Orbax it raises, too. Its log says it before, with the tracebacks of several threads.
logging.getLogger('absl').addFilter(lambda line: f'{os.sep}orbax{os.sep}' not in line.pathname)
logging.getLogger('asyncio').addFilter(lambda line: 'orbax' not in line.getMessage())


class Corrupt(Exception):
  """A step that cannot be trusted; its text is the reason, in a few words."""


class Checkpoints:
  """The steps of one run: `folder/<step>/`. Of those committed, the newest `keep` stay, and the newest that was saved as
  sane (see `training.health`), which `sane.json` names with its loss.

  `state` is any pytree of arrays; what lies under its `model` can be restored alone. In a program of several processes
  all of them make the same calls.
  """

  def __init__(self, folder, keep: int = 2):
    self.folder, self.keep = Path(folder).absolute(), keep
    self._orbax = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler())
    self._thread = concurrent.futures.ThreadPoolExecutor(1)
    self._pending = None
    self._corrupt, self._place = set(), None

  def steps(self) -> list[int]:
    """Committed steps, oldest first, unverified. Temporary and empty folders and other names are none."""
    if not self.folder.is_dir(): return []
    folders = [entry for entry in self.folder.iterdir() if entry.name.isdecimal() and entry.is_dir()]
    return sorted(int(entry.name) for entry in folders if entry.name == str(int(entry.name)) and any(entry.iterdir()))

  def save(self, step: int, state, wait: bool = False, record=None, sane: tuple[int, float] | None = None,
           spared: int | None = None):
    """Copies the state to the host, then writes in the background; `wait` returns when the step is committed. `record`: JSON
    that is committed with it. `sane`: step and loss of a state saved before, which is to be kept until another is as sane;
    `spared`: a step that is not deleted for this one.

    Raises NonFinite, and writes nothing, when a leaf holds NaN or an infinity, DeviceFault when copies of one differ;
    WriteError when there is no room, or it cannot be written for another reason (also for the save before this one, which
    may fail while training goes on).
    """
    self.wait()
    if sane is not None: on_first(self._note_sane, *sane)
    step, leaves = int(step), _named(wait_on_cpu(state))
    manifest = _manifest(leaves)
    if record is not None: manifest |= {'record': record, 'record_crc32': crc32(record)}
    if record is None and self._holds(step, manifest): return
    size = sum(leaf.nbytes for leaf in leaves.values())
    on_first(self._make_room, step, size)
    self._corrupt.clear()   # they have been set aside
    arguments = {item: ocp.args.StandardSave(part) for item, part in _items(leaves).items()}
    with self._explained(step, size):
      self._orbax.save(self.folder / str(step), force=True,
                       args=ocp.args.Composite(manifest=ocp.args.JsonSave(manifest), **arguments))
    self._pending = step, size, self._thread.submit(self._commit, step, spared)
    if wait: self.wait()

  def wait(self):
    """Returns when nothing is being written any more; raises WriteError if that failed."""
    if self._pending is None: return
    with together(): self._settle()

  def _settle(self):
    (step, size, future), self._pending = self._pending, None
    with self._explained(step, size): future.result()

  def close(self):
    """Waits alone: the other processes are elsewhere where this one closes because of an error of its own."""
    try:
      if self._pending is not None: self._settle()
    finally:
      self._thread.shutdown()
      self._orbax.close()

  def latest(self) -> int | None:
    """The newest step of which every bit is as it was saved (reads it all; `restore` checks what it reads anyway).

    None when there is no step. CheckpointError when there are steps and none is intact.
    """
    self.wait()
    found = self._newest(lambda step: (step, self._load(step, None)))
    return None if found is None else found[0]

  def restore(self, abstract, step: int | None = None):
    """The state of `step`, or the newest one that is intact, placed as `abstract` says.

    abstract: the state as a pytree of ShapeDtypeStruct (or arrays) with the shardings wanted, on any mesh; without one a
    leaf goes to the first device. Raises CheckpointError when there is no intact step, or when paths, shapes or dtypes
    are others than those saved: nothing is cast.
    """
    return self._restore(abstract, step, '')

  def restore_model(self, abstract, step: int | None = None):
    """As `restore`, but reads and returns the state's `model` only."""
    return self._restore(abstract, step, 'model/')

  def _restore(self, abstract, step, prefix):
    self.wait()
    wanted = {name: _placed(leaf) for name, leaf in _named(abstract, prefix).items()}
    if step is None:
      loaded = self._newest(lambda step: self._load(step, wanted, prefix))
      if loaded is None: raise CheckpointError(f'no checkpoint in {self.folder}')
    else:
      if step not in self.steps(): raise CheckpointError(f'no step {step} in {self.folder}, only {self.steps()}')
      try: loaded = self._load(step, wanted, prefix)
      except Corrupt as error: raise CheckpointError(f'{self.folder / str(step)} is corrupt: {error}') from error
    return jax.tree.unflatten(jax.tree.structure(abstract), [loaded[name] for name in wanted])

  def _newest(self, load):
    """load(step) of the newest step for which that does not raise Corrupt; None when there is no step at all."""
    steps, passed = self.steps(), {}
    for step in reversed(steps):
      if step in self._corrupt: continue
      try: found = load(step)
      except Corrupt as error:
        self._corrupt.add(step)
        passed[step] = error
        continue
      for number, error in passed.items() if is_first() else ():
        log.warning('checkpoint %s is corrupt, passed over: %s', self.folder / str(number), error)
      return found
    if not steps: return None
    why = ''.join(f' (step {step}: {error})' for step, error in [*passed.items()][:1])
    raise CheckpointError(f'none of the checkpoints in {self.folder} is intact{why}; move them away to start anew')

  def _load(self, step: int, wanted: dict | None, prefix: str = '') -> dict:
    """The leaves `wanted`, or all of them as host arrays; Corrupt unless their digests are those of the manifest."""
    saved = {name: entry for name, entry in self._entries(step).items() if name.startswith(prefix)}
    if wanted is None:
      wanted = {name: np.broadcast_to(np.zeros((), jnp.dtype(dtype)), shape) for name, (dtype, shape, _) in saved.items()}
    stored = {name: _stored_name(name, saved) for name in wanted}
    _compare(saved, {stored[name]: leaf for name, leaf in wanted.items()}, self.folder / str(step))
    with _corruption(): _refuse_odd(self.folder / str(step))
    arguments = {item: ocp.args.StandardRestore({stored[name]: leaf for name, leaf in part.items()})
                 for item, part in _items(wanted).items()}
    with _corruption():
      restored = self._orbax.restore(self.folder / str(step), args=ocp.args.Composite(**arguments))
    found = {name: leaf for item in arguments for name, leaf in restored[item].items()}
    loaded = {name: found[stored[name]] for name in wanted}
    of_loaded = digests(loaded)   # outside: what goes wrong in computing them is no fault of the files
    bad = [name for name in wanted if of_loaded[name][0] != saved[stored[name]][2]]
    if bad: raise Corrupt(f'{bad[0]} is not what was saved')
    return loaded

  def _holds(self, step: int, manifest: dict) -> bool:
    """Whether this very state is already saved as `step`, as after a resume that trained no further."""
    if step in self._corrupt or step not in self.steps(): return False
    try: return self._entries(step) == manifest['leaves']
    except Corrupt: return False

  def _entries(self, step: int) -> dict:
    """{path: [dtype, shape, digest]} of a step's manifest, or Corrupt."""
    with _corruption():
      _refuse_odd(self.folder / str(step) / 'manifest')
      args = ocp.args.Composite(manifest=ocp.args.JsonRestore())
      manifest = self._orbax.restore(self.folder / str(step), args=args)['manifest']
      if manifest['crc32'] != crc32(manifest['leaves']): raise Corrupt('its manifest is damaged')
      for name, (dtype, shape, value) in manifest['leaves'].items(): _check_entry(name, dtype, shape, value)
      return manifest['leaves']

  def _make_room(self, step: int, size: int):
    """Before a save: clears what killed processes left, sets corrupt steps aside, checks the free space."""
    workdirs.still_held(self.folder)
    with self._explained(step, size):
      self.folder.parent.stat()   # where that is gone, so is the run
      workdirs.folder(self.folder.parent, self.folder.name)
      if self._place is not None and self._gone(): raise OSError(self._gone())
      found = os.stat(self.folder)
      self._place = found.st_dev, found.st_ino
      for entry in self.folder.iterdir(): workdirs.place(self.folder, entry.name)   # a link to a step elsewhere, say
      self._clear_temporary()
      for number in self._corrupt & set(self.steps()):   # else they would count as new, or as already saved
        workdirs.move(self.folder, str(number), f'{number}.corrupt')
      writing.check_room(self.folder, size, FILES)

  def _clear_temporary(self):
    for entry in self.folder.glob('*.orbax-checkpoint-tmp*'):
      with contextlib.suppress(OSError): workdirs.remove(self.folder, entry.name)

  def _note_sane(self, step: int, loss: float):
    if step not in self.steps(): return
    with writing.dispensable(self.folder / SANE): workdirs.write(self.folder, SANE, json.dumps({'step': step, 'loss': loss}))

  def _commit(self, step: int, spared: int | None):
    """In the background: waits for the step and its manifest, and only then deletes steps that are too many."""
    self._orbax.wait_until_finished()
    if not is_first(): return
    others = [number for number in self.steps() if number != step]
    for number in others[:max(0, len(others) - self.keep + 1)]:
      if number not in (self.sane_step(), spared): workdirs.remove(self.folder, str(number))

  def sane_step(self) -> int | None:
    """The newest step that was saved as sane, if it is still there."""
    return sane_step(self.folder)

  def sane_loss(self) -> float:
    """The loss that was saved with it; infinite where there is none."""
    return _sane(self.folder).get('loss', math.inf)

  def _gone(self) -> str | None:
    """Why the folder is not the one that was written into."""
    try: found = os.stat(self.folder)
    except OSError as error: return os.strerror(error.errno)
    return 'another folder has taken its place' if self._place not in (None, (found.st_dev, found.st_ino)) else None

  @contextlib.contextmanager
  def _explained(self, step: int, size: int):
    try: yield
    except Exception as error:
      if not (reason := writing.reason(error) or self._gone()): raise   # libraries say all sorts of things
      self._clear_temporary()
      raise WriteError(f'step {step}, of {size:,} bytes, cannot be saved in {self.folder}: {reason}'
                       f'{writing.free(self.folder)}; earlier steps are as they were') from error


def sane_step(folder) -> int | None:
  """The newest step of a folder of checkpoints that was saved as sane, if it is still there."""
  step = _sane(Path(folder)).get('step')
  return step if (Path(folder) / str(step)).is_dir() else None


def _sane(folder: Path) -> dict:
  try: found = json.loads((folder / SANE).read_text(encoding='utf-8'))
  except (OSError, ValueError): return {}
  return found if isinstance(found, dict) and {'step': int, 'loss': float} == {k: type(v) for k, v in found.items()} else {}


def _named(tree, prefix: str = '') -> dict:
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {prefix + path_name(path): leaf if hasattr(leaf, 'dtype') else np.asarray(leaf) for path, leaf in leaves}


def _items(leaves: dict) -> dict[str, dict]:
  """The leaves in the two parts that a step is stored in, so that a model can be read without the optimizer."""
  parts = {'model': {}, 'rest': {}}
  for name, leaf in leaves.items(): parts['model' if name.startswith('model/') else 'rest'][name] = leaf
  return {item: part for item, part in parts.items() if part}


# Names of attributes in earlier versions, by which leaves of their checkpoints are stored.
RENAMED = {'counter': 'clock'}


def _stored_name(name: str, saved: dict) -> str:
  """The name that a leaf has in a checkpoint, which may be one of an earlier version's."""
  if name in saved: return name
  old = '/'.join(RENAMED.get(part, part) for part in name.split('/'))
  return old if old in saved else name


def _placed(leaf) -> jax.ShapeDtypeStruct:
  sharding = getattr(leaf, 'sharding', None) or SingleDeviceSharding(jax.local_devices()[0])
  return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _manifest(leaves: dict) -> dict:
  """{'leaves': {path: [dtype, shape, digest]}, 'crc32': of that}; raises NonFinite, DeviceFault."""
  found = digests(leaves)
  bad = [name for name, (_, finite) in found.items() if not finite]
  if bad: raise NonFinite(f'state not saved: NaN or infinity in {", ".join(bad[:5])}{" …" if len(bad) > 5 else ""}')
  entries = {name: [str(leaf.dtype), list(leaf.shape), found[name][0]] for name, leaf in leaves.items()}
  return {'leaves': entries, 'crc32': crc32(entries)}


def _refuse_odd(folder: Path):
  """Raises Corrupt for a link, which would be read elsewhere, or a pipe, which would be waited for."""
  if not folder.is_dir(): return   # Orbax says so
  try:
    with os.scandir(folder) as entries: workdirs.check_all(entries)
  except ConfigError as error: raise Corrupt(f'{Path(error.value).relative_to(folder)} is no file') from error


def _check_entry(name, dtype, shape, value):
  """Raises Corrupt, TypeError or ValueError for what describes no array."""
  jnp.dtype(dtype)
  whole = isinstance(shape, list) and all(type(size) is int and size >= 0 for size in shape) and type(value) is int
  if not whole: raise Corrupt(f'its manifest has no shape and digest of {name}')


def _compare(saved: dict, wanted: dict, folder: Path):
  """Raises CheckpointError that names the first five paths on which a checkpoint and what is wanted of it differ."""
  saved = {name: f'{dtype}{tuple(shape)}' for name, (dtype, shape, _) in saved.items()}
  wanted = {name: f'{leaf.dtype}{tuple(leaf.shape)}' for name, leaf in wanted.items()}
  differ = sorted(name for name in saved | wanted if saved.get(name) != wanted.get(name))
  if not differ: return
  said = [f'{name} is {saved.get(name, "absent")} there, {wanted.get(name, "absent")} here' for name in differ]
  more = [f'and {len(said) - 5} more'] if len(said) > 5 else []
  raise CheckpointError(f'{folder} holds another state: {"; ".join(said[:5] + more)}')


# What Orbax and TensorStore raise over damaged files. Anything else is a fault of the program or of the machine, and is not
# to be mistaken for it: a user who is told of corruption moves good files away.
OF_READING = (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError, UnicodeError)
NOT_OF_READING = ('incompatible devices', 'out of memory', 'sharding', 'RESOURCE_EXHAUSTED')
OF_ANOTHER_TREE = 'tree structures do not match'   # and prints shardings; the manifest has said that it is the same


LATE = 'Event loop is closed'


def _drop_late_reads():
  """Keeps a traceback from being printed for each array that TensorStore's threads still read when another one could not be
  read, and Orbax has closed the loop that waits for them."""
  before = sys.unraisablehook
  if getattr(before, 'drops', None) == LATE: return

  def hook(unraisable):
    if not isinstance(unraisable.exc_value, RuntimeError) or str(unraisable.exc_value) != LATE: before(unraisable)
  hook.drops = LATE
  sys.unraisablehook = hook


@contextlib.contextmanager
def _corruption() -> Iterator[None]:
  """Turns what Orbax raises over damaged files into Corrupt, on all processes if it happens on one."""
  _drop_late_reads()
  reason = None
  try: yield
  except Corrupt as error: reason = str(error)
  except OF_READING as error:
    text = str(error).strip()
    if OF_ANOTHER_TREE not in text and any(sign.lower() in text.lower() for sign in NOT_OF_READING): raise
    reason = text.split('\n')[0][:160] or type(error).__name__
  if several() and not multihost_utils.process_allgather(np.asarray(reason is None)).all():
    reason = reason or 'another process cannot read it'
  if reason: raise Corrupt(reason)


@contextlib.contextmanager
def lock(workdir) -> Iterator[None]:
  """Holds `workdir/lock` (see `workdir.lock`). In a program of several processes the first one holds it for all."""
  with contextlib.ExitStack() as held:
    with together():
      try:
        if is_first(): held.enter_context(workdirs.lock(workdir))
      except OSError as error:
        raise ConfigError('workdir', str(workdir), f'cannot be used: {writing.reason(error)}') from error
    yield
