"""How the C library gets memory for programs on a CPU."""
import os
import sys
from pathlib import Path

from efficient_lm.system import interruption

SETTING = 'glibc.malloc.hugetlb=1'
OLDEST = (2, 35)   # the version of glibc that has this setting
HUGE_PAGES = Path('/sys/kernel/mm/transparent_hugepage/enabled')   # 'always [madvise] never'


def use_huge_pages() -> None:
  """Starts this program anew, once, so that the C library asks for large blocks in pages of 2 MB; returns where it does so
  already, or cannot.

  XLA:CPU allocates the temporaries of every step and frees them after it. glibc returns such blocks to the kernel, which
  clears each page anew at the next step: 90,000 pages of 4 kB in `configs/moe.py`, a fifth of its time. glibc can keep the
  blocks instead, but they are not reused exactly, and a process grows to half as much memory again. In huge pages there are
  few of them to clear. The setting is read when a process starts, hence the second start, which takes as long as this
  module took to be imported. Of `configs/moe.py` and `configs/baseline.py`, 40 steps on 2 cores, CPU seconds a step and the
  most memory in use:

    glibc's defaults   0.87 s   1.2 GiB    0.61 s   0.9 GiB
    blocks kept        0.67 s   1.8 GiB    0.49 s   1.6 GiB
    huge pages         0.70 s   1.2 GiB    0.53 s   0.9 GiB
  """
  tunables = os.environ.get('GLIBC_TUNABLES', '')
  if 'glibc.malloc.hugetlb' in tunables or not _has_setting(): return
  os.environ['GLIBC_TUNABLES'] = ':'.join(filter(None, (tunables, SETTING)))
  interruption.keep_back()   # until the program that follows can hear them
  os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _has_setting() -> bool:
  """Whether C library and kernel know of huge pages."""
  try:
    name, _, version = os.confstr('CS_GNU_LIBC_VERSION').partition(' ')   # 'glibc 2.36'
    known = name == 'glibc' and tuple(map(int, version.split('.')[:2])) >= OLDEST
    return known and '[never]' not in HUGE_PAGES.read_text()
  except (AttributeError, ValueError, OSError): return False   # musl, macOS and Windows
