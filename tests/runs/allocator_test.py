"""Programs start anew with huge pages, once, where there are such; everywhere else they just go on."""
import os
import pathlib
import subprocess
import sys

import pytest

from efficient_lm.runs import allocator
from efficient_lm.system import interruption

ROOT = pathlib.Path(__file__).parent.parent.parent
PROGRAM = """
import os
import resource
import sys
from efficient_lm.runs.allocator import use_huge_pages
print('started', flush=True)
if sys.argv[1] == 'huge': use_huge_pages()
import numpy as np
def step(): np.ones(16 * 2**20)   # 128 MiB: 32768 pages of 4 kB
step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4): step()
print(sys.argv[1:], sys.flags.optimize, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
needs_huge_pages = pytest.mark.skipif(not allocator._has_setting(), reason='needs glibc 2.35 and a kernel with huge pages')


def said(how: str, **environment) -> list[str]:
  plain = {name: value for name, value in os.environ.items() if name != 'GLIBC_TUNABLES'}
  ran = subprocess.run([sys.executable, '-O', '-c', PROGRAM, how, 'a b'], capture_output=True, text=True, check=True,
                       cwd=ROOT, env={**plain, **environment})
  return ran.stdout.splitlines()


@needs_huge_pages
def test_it_starts_once_more_with_the_same_words_and_has_few_pages_to_clear():
  """numpy asks for huge pages itself, unless it is told not to."""
  *started, last = said('huge', NUMPY_MADVISE_HUGEPAGE='0')
  words, _, faults = last.rpartition(' ')
  assert started == ['started', 'started'] and words == "['huge', 'a b'] 1"
  assert int(faults) < 4 * 32768 / 10, 'the ends of a block are no whole huge pages'
  *started, last = said('plain', NUMPY_MADVISE_HUGEPAGE='0')
  assert started == ['started'] and int(last.rpartition(' ')[2]) > 4 * 32768 / 2, 'else the setting would be needless'


@pytest.fixture
def lets_signals_through():
  """What is not replaced by another program goes on here, with signals kept back for that one."""
  yield
  interruption.let_through()


@needs_huge_pages
def test_other_settings_of_the_user_stay_and_his_own_is_kept(lets_signals_through):
  kept = []
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(os, 'execv', lambda *words: kept.append(os.environ['GLIBC_TUNABLES']))
    for given in ('', 'glibc.malloc.check=1', 'glibc.malloc.hugetlb=2'):
      patch.setenv('GLIBC_TUNABLES', given)
      allocator.use_huge_pages()
  assert kept == ['glibc.malloc.hugetlb=1', 'glibc.malloc.check=1:glibc.malloc.hugetlb=1']


@pytest.mark.parametrize('version', ['musl 1.2', 'glibc 2.34', 'glibc', None])
def test_it_goes_on_where_there_is_no_such_setting(monkeypatch, version):
  monkeypatch.delenv('GLIBC_TUNABLES', raising=False)
  monkeypatch.setattr(os, 'confstr', lambda name: version)
  monkeypatch.setattr(os, 'execv', lambda *words: pytest.fail('started again'))
  allocator.use_huge_pages()
