"""How much devices hold."""
import os

import jax


def available(devices) -> int:
  """Bytes of memory of these devices together. Those of a CPU share the machine's."""
  stats = [None if device.platform == 'cpu' else device.memory_stats() for device in devices]
  if all(stats): return sum(one['bytes_limit'] for one in stats)
  return os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') * jax.process_count()
