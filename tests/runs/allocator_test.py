"""A process keeps the memory that it freed, in a process of its own: the settings cannot be taken back."""
import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource
import sys
import numpy as np
from efficient_lm.allocator import keep_freed_memory
if sys.argv[1] == 'keep': assert keep_freed_memory()
def step(): np.ones(16 * 2**20)   # 128 MiB: 32768 pages
step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4): step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(how: str) -> int:
  """Pages that the kernel had to provide for four steps after the first."""
  ran = subprocess.run([sys.executable, '-c', FAULTS, how], capture_output=True, text=True, check=True)
  return int(ran.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != 'glibc', reason='only glibc has these settings')
def test_the_memory_of_a_step_serves_the_next():
  assert page_faults('keep') < 100, 'not one page is asked of the kernel again, but for a few of the interpreter'
  assert page_faults('default') > 200, 'else the settings would be needless'
