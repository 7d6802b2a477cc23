"""How much devices hold, on a CPU and elsewhere."""
import types

import jax

from efficient_lm.parallel import memory


def test_cpu_devices_share_the_memory_of_the_machine():
  one, all_of_them = memory.available(jax.devices()[:1]), memory.available(jax.devices())
  assert 2 ** 28 < one == all_of_them < 2 ** 50


def test_other_devices_have_their_own():
  device = types.SimpleNamespace(platform='gpu', memory_stats=lambda: {'bytes_limit': 2 ** 36})
  assert memory.available([device] * 4) == 2 ** 38
