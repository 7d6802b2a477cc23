"""Whether the processes of a run see one workdir: each writes its part of a checkpoint there, and reads those of others."""
import secrets
import time
from pathlib import Path

from efficient_lm.errors import ConfigError
from efficient_lm.parallel import processes

SECONDS = 5   # until a file that one host writes is seen by another, on a network file system


def check(workdir):
  """Raises ConfigError, in all processes, where `workdir` is not the same folder for all. Leaves nothing behind."""
  if not processes.several(): return
  folder = _existing(Path(workdir).absolute())
  name = f'.efficient_lm-{processes.told(secrets.token_hex(8))}'
  try:
    with processes.together():
      if processes.is_first(): (folder / name).touch()
    with processes.together():
      if not _seen(folder / name): raise ConfigError('--workdir', str(workdir), _fix(folder))
  finally:
    if processes.is_first(): (folder / name).unlink(missing_ok=True)


def _existing(path: Path) -> Path:
  """The folder itself, or the nearest one around it that is there."""
  return next(folder for folder in (path, *path.parents) if folder.is_dir())


def _seen(file: Path) -> bool:
  deadline = time.monotonic() + SECONDS
  while not file.exists():
    if time.monotonic() > deadline: return False
    time.sleep(0.1)
  return True


def _fix(folder: Path) -> str:
  return (f'is not one folder for all processes: not all see in {folder} what process 0 writes there; '
          f'name a folder on a file system that all hosts have mounted (NFS, Lustre, Filestore)')
