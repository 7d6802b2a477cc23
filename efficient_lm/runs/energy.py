"""Joules: what a machine says of the energy it draws."""
import math
from pathlib import Path

import jax


class Energy:
  """Joules drawn since it was made, by the counters of GPUs (NVML) or processor packages (RAPL), whole machine.

  `source` says which, or why there is none. Call `joules` every few minutes: RAPL counters wrap after some 2**38 uJ.
  """

  def __init__(self):
    self._counters, self.source = _nvml() if jax.default_backend() == 'gpu' else _rapl()
    self._last, self._total = [read() for read, _ in self._counters], 0.0

  def joules(self) -> float | None:
    if not self._counters: return None
    now = [read() for read, _ in self._counters]
    for before, after, (_, wrap) in zip(self._last, now, self._counters): self._total += (after - before) % wrap
    self._last = now
    return self._total


def _nvml():
  try:
    import pynvml
    pynvml.nvmlInit()
    handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
    counters = [(lambda handle=handle: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3, math.inf)
                for handle in handles]
    for read, _ in counters: read()
  except Exception as error: return [], f'none: NVML cannot be read ({type(error).__name__})'   # a driver raises its own
  return counters, f'NVML, {len(counters)} GPU'


def _rapl():
  if jax.default_backend() != 'cpu': return [], f'none: no counter for {jax.default_backend()}'
  counters = []
  for folder in sorted(Path('/sys/class/powercap').glob('intel-rapl:?')):   # packages; their parts have a second number
    try:
      wrap = int((folder / 'max_energy_range_uj').read_text()) / 1e6
      read = lambda path=folder / 'energy_uj': int(path.read_text()) / 1e6
      read()
    except OSError: continue
    counters.append((read, wrap))
  return counters, f'RAPL, {len(counters)} packages' if counters else 'none: RAPL cannot be read'
