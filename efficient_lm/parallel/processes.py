"""A run of several processes, one a host as a rule: how they find each other, and how they agree.

All of them execute the same program on arrays that lie over the devices of all. What one does alone (a file that the first
one writes, a signal that reaches one of them) the others have to hear of, or they wait for it in the next product. In a
program of one process everything here costs nothing and opens no socket.
"""
import collections
import contextlib
import dataclasses
import functools
import hashlib
import os
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping

from efficient_lm import errors
from efficient_lm.errors import ConfigError, OtherProcess
from efficient_lm.parallel import stopping, tpu
from efficient_lm.system import interruption

SLURM = ('SLURM_JOB_ID', 'SLURM_STEP_NODELIST', 'SLURM_NTASKS', 'SLURM_PROCID', 'SLURM_LOCALID')   # of what srun starts
WORDS = {'coordinator': 'JAX_COORDINATOR_ADDRESS', 'num_processes': 'JAX_NUM_PROCESSES', 'process_id': 'JAX_PROCESS_ID'}
PATIENCE = 300   # seconds until a process that does not answer is given up
SAID = 500       # bytes of an error's text that the other processes hear
GONE = ('gloo', 'nccl', 'connection', 'socket closed', 'unavailable', 'heartbeat', 'barrier')   # said of one that has ended
BEHIND = 2       # steps after which `Agreement` answers, so that it never waits for the step that is being computed


@dataclasses.dataclass(frozen=True)
class Group:
  """The processes of a run. coordinator: 'host:port' where process 0 listens; all None: as JAX finds them."""
  coordinator: str | None = None
  process_id: int | None = None
  num_processes: int | None = None


# ---------------------------------------------------------------- finding each other, before JAX is loaded

def group_of(coordinator: str | None, process_id: int | None, num_processes: int | None,
             environ: Mapping[str, str] = os.environ) -> Group | None:
  """The processes that this one is one of, by flags, by variables of the same meaning (`WORDS`), by Slurm or by a TPU slice;
  None where it is alone. Raises ConfigError for flags or variables that are wrong or not all there."""
  given = {'coordinator': coordinator, 'num_processes': num_processes, 'process_id': process_id}
  found = {name: _given(name, value, environ) for name, value in given.items()}
  missing = [name for name, value in found.items() if value is None]
  if len(missing) == 3: return Group() if _num_found(environ) > 1 else None
  if missing == ['num_processes', 'process_id'] and coordinator is None and _num_found(environ) > 1:
    return Group(coordinator=_address(found['coordinator']))   # JAX takes the rest from where the process was started
  if missing: raise ConfigError(f'--{missing[0]}', None, 'is missing: --coordinator, --process_id and --num_processes are '
                                'given together (or their variables, ' + ', '.join(WORDS.values()) + '), or none of them')
  group = Group(**found)
  _address(group.coordinator)
  if group.num_processes < 1: raise ConfigError('--num_processes', group.num_processes, 'must be at least 1')
  if not 0 <= group.process_id < group.num_processes:
    raise ConfigError('--process_id', group.process_id, f'must be from 0 to {group.num_processes - 1}, one below '
                      f'--num_processes = {group.num_processes}')
  return group if group.num_processes > 1 else None


def _given(name: str, value, environ):
  if value is not None or not environ.get(WORDS[name]): return value
  text = environ[WORDS[name]]
  if name == 'coordinator': return text
  try: return int(text)
  except ValueError as error: raise ConfigError(WORDS[name], text, 'must be a whole number') from error


def _address(text: str) -> str:
  host, _, port = text.rpartition(':')
  if host and port.isdecimal() and 0 < int(port) < 2 ** 16 and not set(text) & set('/ '): return text
  raise ConfigError('--coordinator', text, 'must be host:port of process 0, as 10.0.0.2:8476')


def _num_found(environ) -> int:
  """How many processes the environment says there are."""
  if all(name in environ for name in SLURM):
    try: return int(environ['SLURM_NTASKS'])
    except ValueError as error:
      raise ConfigError('SLURM_NTASKS', environ['SLURM_NTASKS'], 'must be a whole number') from error
  return tpu.num_hosts(environ)


def join(group: Group | None, patience: int = PATIENCE):
  """Meets the other processes; returns when all are there. To be called before any device is used.

  Process 0 listens on the coordinator's address and on no other, unless JAX_COORDINATOR_BIND_ADDRESS names one. Raises
  ConfigError for an address that cannot be listened on, and where they were told of other numbers of processes. Whoever does
  not appear within `patience` seconds ends this process with one line and the exit code of `OtherProcess`: JAX would abort
  it without a word that helps.
  """
  if group is None: return
  import jax
  jax.config.update('jax_enable_preemption_service', False)   # it takes SIGTERM for itself: see Agreement
  known, own = group.coordinator, {}
  if group.num_processes is not None:
    bind = os.environ.get('JAX_COORDINATOR_BIND_ADDRESS', known)
    own = {'cluster_detection_method': 'deactivate', 'coordinator_bind_address': bind}
  elif _has_node_to_itself(os.environ):
    own = {'local_device_ids': range(int(os.environ['SLURM_GPUS_ON_NODE']))}   # JAX would take one GPU a process
  giving_up = threading.Timer(patience, _give_up, (group, patience))
  giving_up.daemon = True
  giving_up.start()
  try:
    jax.distributed.initialize(known, group.num_processes, group.process_id, initialization_timeout=patience + 60,
                               shutdown_timeout_seconds=60, **own)
  except RuntimeError as error:
    if 'start RPC server' not in str(error): raise OtherProcess(f'--coordinator = {known!r}: {error}') from error
    raise ConfigError('--coordinator', known, 'cannot be listened on by process 0: take an address of its host and a free '
                      'port') from error
  finally: giving_up.cancel()
  stopping.share()
  refuse_unlike(**{'--num_processes': f'{group.num_processes}'})   # JAX takes process 0's


def _has_node_to_itself(environ) -> bool:
  """Whether Slurm has started one process a node, with all its GPUs."""
  nodes = environ.get('SLURM_STEP_NUM_NODES') or environ.get('SLURM_NNODES')
  return all(name in environ for name in SLURM) and nodes == environ['SLURM_NTASKS'] and bool(
    environ.get('SLURM_GPUS_ON_NODE', '').isdecimal())


def _give_up(group: Group, patience: int):
  where = f'--coordinator = {group.coordinator!r}' if group.coordinator else 'the coordinator that JAX has found'
  who = 'not all other processes have come' if group.process_id == 0 else 'no answer, or not all processes have come'
  how = 'the same address' if group.process_id is None else 'the same address and a --process_id of its own'
  print(f'{where}: {who} within {patience} seconds; start all of them, each with {how}, or wait longer: '
        f'--coordinator_timeout=SECONDS', file=sys.stderr, flush=True)
  os._exit(OtherProcess.exit_code)


# ---------------------------------------------------------------- agreeing, while they run

def several() -> bool:
  """Whether the program has more than one process."""
  import jax
  return jax.process_count() > 1


def is_first() -> bool:
  """Whether this is the process that writes and speaks for all."""
  import jax
  return jax.process_index() == 0


def gathered(array):
  """This process's numpy array and those of the others, stacked in their order."""
  if not several(): return array[None]
  from jax.experimental import multihost_utils
  return multihost_utils.process_allgather(array)


def told(text: str) -> str:
  """The first process's `text`, of as many bytes in all of them."""
  import numpy as np
  return bytes(gathered(np.frombuffer(text.encode(), np.uint8))[0]).decode() if several() else text


@contextlib.contextmanager
def together() -> Iterator[None]:
  """All processes leave the block, or none does: an error that one raises inside ends the others, too, with its exit code
  and its words. All of them enter it, and none goes on before all have come to its end."""
  raised = None
  try: yield
  except (Exception, errors.Preempted) as error:
    if not several(): raise
    raised = error
  if not several(): return
  import numpy as np
  text = ' '.join(f'{raised}'.split()).encode()[:SAID] if raised else b''
  own = np.zeros(SAID + 2, np.uint8)
  own[0], own[1] = raised is not None, getattr(raised, 'exit_code', 1)
  own[2:2 + len(text)] = np.frombuffer(text, np.uint8)
  found = gathered(own)
  if raised: raise raised
  for number, (failed, code, *said) in enumerate(found):
    if failed: raise _error_of(number, int(code), bytes(map(int, said)).rstrip(b'\0').decode(errors='replace'))


def _error_of(number: int, code: int, text: str) -> Exception:
  known = (errors.IncompatibleError, errors.CheckpointError, errors.NonFinite, errors.WriteError, errors.DeviceFault,
           errors.Preempted)
  kinds = {kind.exit_code: kind for kind in known}
  return kinds.get(code, OtherProcess)(f'process {number}: {text}')


def on_first(function: Callable, *arguments):
  """Calls `function` in the first process alone, once all have come here, and goes on in all of them when it is done. What
  it raises all raise."""
  with together(): pass   # nobody still reads what is about to be changed
  with together():
    if is_first(): function(*arguments)


def refuse_unlike(**texts: str):
  """Raises ConfigError, in all processes, that names the first of `texts` that is not the same in all."""
  if not several(): return
  import numpy as np
  digests = np.stack([np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint8) for text in texts.values()])
  found = gathered(digests)
  for i, name in enumerate(texts):
    unlike = [number for number, one in enumerate(found) if (one[i] != found[0][i]).any()]
    if unlike: raise ConfigError(name, f'process {unlike[0]}', 'has another one than process 0: give all processes the same '
                                 'command, the same files and the same version of Python and of this package')


@contextlib.contextmanager
def ending_together() -> Iterator[None]:
  """Of several processes, one that fails in a way of its own ends at once, and so do those that wait for it. An error that
  has an `exit_code` is one that all of them raise, and goes on, but for an interruption that is not `in_all`; otherwise JAX
  would wait at the end for those that never come, and abort all of them. Where another process has gone, this one says so
  in one line and ends as for `OtherProcess`."""
  try: yield
  except BaseException as error:
    own = getattr(error, 'exit_code', None)
    if not several() or isinstance(error, SystemExit) or (own is not None and getattr(error, 'in_all', True)): raise
    interruption.wait_if_leaving()
    is_gone = own is None and any(sign in str(error).lower() for sign in GONE)
    if is_gone and interruption.received():   # by the signal that this one has heard, too
      is_gone, own, error = False, errors.Preempted.exit_code, interruption.said()
    if is_gone: print(f'another process has gone ({" ".join(str(error).split())[:160]}); its log says why, and the same '
                      'command resumes', file=sys.stderr)
    elif own is not None: print(' '.join(str(error).split()), file=sys.stderr)
    else: traceback.print_exception(error)
    for stream in (sys.stdout, sys.stderr): stream.flush()
    interruption.leave(OtherProcess.exit_code if is_gone else own or 1)


class Agreement:
  """`agreed(flag) -> bool`, called by all processes once a step: whether any of them has raised its flag, the same answer in
  all. The flag must stay raised. In several processes the answer is that of BEHIND calls before."""

  def __init__(self):
    self._pending = collections.deque()

  def __call__(self, flag: bool) -> bool:
    if not several(): return flag
    self._pending.append(_any(flag))
    return len(self._pending) > BEHIND and bool(self._pending.popleft())


def checking() -> Callable[[], None]:
  """`check()`, for work in parts that all processes do alike, to be called between two of them. It raises Preempted where a
  signal has come; of several processes in all of them at the same call."""
  agreed = Agreement()
  def check():
    if not agreed(interruption.received() is not None): return
    if not several(): interruption.check()
    heard = 'another process was interrupted: stopped where there was nothing to save; the same command goes on from there'
    interrupted = errors.Preempted(interruption.said() or heard)
    interrupted.in_all = True
    raise interrupted
  return check


def _any(flag: bool):
  """A bool on all devices: whether any process has `flag`."""
  import jax
  import numpy as np
  from jax.sharding import Mesh, NamedSharding, PartitionSpec

  from efficient_lm.parallel.sharding import wait_on_cpu
  mesh = Mesh(np.array(jax.devices()), 'device')
  here = [jax.device_put(np.array([flag]), device) for device in jax.local_devices()]
  flags = jax.make_array_from_single_device_arrays((mesh.size,), NamedSharding(mesh, PartitionSpec('device')), here)
  with jax.set_mesh(mesh): return wait_on_cpu(_anywhere()(flags))


@functools.cache
def _anywhere():
  import jax
  from jax.sharding import PartitionSpec
  return jax.jit(lambda flags: flags.any(), out_shardings=PartitionSpec())


def fetched(tree):
  """`jax.device_get` that also reads arrays of which this process holds but a part; all processes call it together."""
  import jax
  from jax.experimental import multihost_utils

  def whole(leaf):
    if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable or leaf.is_fully_replicated: return leaf
    return multihost_utils.process_allgather(leaf, tiled=True)
  return jax.device_get(jax.tree.map(whole, tree))
