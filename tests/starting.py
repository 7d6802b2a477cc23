"""Several processes on this machine that train as one, for tests: started, watched, and what they have logged."""
import json
import os
import pathlib
import socket
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).parent.parent
PATIENCE = 240   # seconds until a program that logs nothing counts as stuck, on a busy machine
TIMINGS = ('steps_per_second', 'tokens_per_second', 'crc32')   # and the checksum of rows that have them


def free_port() -> int:
  """Of the loopback, that nobody listens on."""
  with socket.socket() as found:
    found.bind(('127.0.0.1', 0))
    return found.getsockname()[1]


def environment(devices: int = 1) -> dict[str, str]:
  """Of a program with so many devices. It is compiled quickly: what is tested holds of any program."""
  return {**os.environ, 'PYTHONPATH': str(ROOT), 'JAX_PLATFORMS': 'cpu', 'JAX_CPU_COLLECTIVES_IMPLEMENTATION': 'gloo',
          'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0', 'JAX_DISABLE_MOST_OPTIMIZATIONS': '1',
          'XLA_FLAGS': f'--xla_force_host_platform_device_count={devices}'}


def start(workdir, words, processes: int = 1, devices: int = 1, own: dict[int, list[str]] | None = None,
          variables: dict[int, dict[str, str]] | None = None, module: str = 'efficient_lm.main', cwd=ROOT) -> list:
  """The running programs. devices: of each; own, variables: words of one of them, and of its environment; cwd: where
  they begin."""
  port, started = free_port(), []
  for i in range(processes):
    group = [f'--coordinator=127.0.0.1:{port}', f'--process_id={i}', f'--num_processes={processes}']
    command = [sys.executable, '-m', module, f'--workdir={workdir}', *words, *(group if processes > 1 else [])]
    started.append(subprocess.Popen([*command, *(own or {}).get(i, [])], cwd=cwd, text=True,
                                    env=environment(devices) | (variables or {}).get(i, {}), stdout=subprocess.PIPE,
                                    stderr=subprocess.PIPE))
  return started


def ends(programs) -> tuple[list[int], list[str], list[str]]:
  """Exit codes, and what each has printed and said on its standard error. Gloo says of itself that it is connected."""
  try: found = [program.communicate(timeout=PATIENCE) for program in programs]
  finally:
    for program in programs: program.kill()
  own = lambda text: '\n'.join(line for line in text.splitlines() if '[Gloo]' not in line)
  return [program.returncode for program in programs], [own(out) for out, _ in found], [own(said) for _, said in found]


def finish(programs):
  """Waits for programs that are to come to their end."""
  codes, _, said = ends(programs)
  assert set(codes) == {0}, said


def rows(workdir) -> list[dict]:
  """Of metrics.jsonl, but for a line that is still being written."""
  file = pathlib.Path(workdir) / 'metrics.jsonl'
  return [json.loads(line) for line in file.read_text().split('\n')[:-1]] if file.is_file() else []


def wait_for_step(programs, workdir, step: int):
  """Returns when that step has been logged."""
  deadline = time.monotonic() + PATIENCE
  while not any(row['step'] >= step for row in rows(workdir)):
    assert all(program.poll() is None for program in programs), ends(programs)
    assert time.monotonic() < deadline, 'the programs are stuck'
    time.sleep(0.01)


def logged(workdir) -> dict:
  """(step, name) -> number, of all that does not depend on the machine."""
  return {(row['step'], name): value for row in rows(workdir) for name, value in row.items() if name not in TIMINGS}


def saved(workdir) -> list[int]:
  """Steps of the first training whose state is there."""
  return sorted(int(path.name) for path in (pathlib.Path(workdir) / 'checkpoints').iterdir() if path.name.isdecimal())
