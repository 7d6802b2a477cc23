"""`python -m efficient_lm.main` that sends itself a signal once, when it comes to a phase of its work:

  FAULT_PHASE=save FAULT_NOTE=FILE python -m tests.faults.interrupting --config=… --workdir=…

FAULT_CALL: the call of the phase's function in which it comes, if not that of `PHASES`; FAULT_SIGNAL: which, if not SIGTERM;
FAULT_NOTE: a file for the time at which it was sent. Without FAULT_PHASE it is the command itself. Functions are looked for
as their modules are loaded, so that nothing is loaded earlier than it would be, and signals are heard from the same moment
on.
"""
import importlib.abc
import importlib.util
import os
import pathlib
import runpy
import signal
import sys
import threading
import time

# phase: module, class in it or '', function (None: while the module is imported), its call, and how many seconds after it
# the signal comes: compiling is no function of ours.
PHASES = {
  'import': ('efficient_lm.runs.run', '', None, 1, 0.0),
  'build': ('efficient_lm.runs.run', 'Run', '_check_stages', 1, 0.0),
  'compile': ('efficient_lm.training.trainer', '', 'compiled_step', 1, 0.3),
  'step': ('efficient_lm.runs.monitor', 'Monitor', 'log', 3, 0.0),
  'evaluation': ('efficient_lm.runs.monitor', 'Monitor', 'evaluate', 1, 0.0),
  'save': ('efficient_lm.runs.checkpoint', 'Checkpoints', 'save', 1, 0.0),
  'stage': ('efficient_lm.techniques.pruning.prune_once', 'PruneOnce', '__call__', 1, 0.0),
  'commit': ('efficient_lm.runs.commits', '', 'commit', 2, 0.0),
  'report': ('efficient_lm.runs.report_page', '', 'write_report', 1, 0.0),
}


def send(delay: float):
  """Sends this process the signal."""
  def now():
    pathlib.Path(os.environ['FAULT_NOTE']).write_text(str(time.time()))
    os.kill(os.getpid(), getattr(signal, os.environ.get('FAULT_SIGNAL', 'SIGTERM')))
  if delay: threading.Timer(delay, now).start()
  else: now()


class Patched(importlib.abc.MetaPathFinder, importlib.abc.Loader):
  """Finds the phase's module as others do, and changes it once it has been executed."""

  def __init__(self, module, owner, name, which, delay):
    self.module, self.owner, self.name, self.which, self.delay = module, owner, name, which, delay

  def find_spec(self, fullname, path, target=None):
    if fullname != self.module: return None
    sys.meta_path.remove(self)
    spec = importlib.util.find_spec(fullname)
    self.inner, spec.loader = spec.loader, self
    return spec

  def create_module(self, spec): return self.inner.create_module(spec)

  def exec_module(self, module):
    if self.name is None: send(self.delay)
    self.inner.exec_module(module)
    if self.name is None: return
    owner, calls = getattr(module, self.owner) if self.owner else module, []
    original = getattr(owner, self.name)
    def called(*arguments, **words):
      calls.append(self.name)
      if len(calls) == self.which: send(self.delay)
      return original(*arguments, **words)
    setattr(owner, self.name, called)


if __name__ == '__main__':
  if 'FAULT_PHASE' in os.environ:
    *place, which, delay = PHASES[os.environ['FAULT_PHASE']]
    sys.meta_path.insert(0, Patched(*place, int(os.environ.get('FAULT_CALL', which)), delay))
  runpy.run_module('efficient_lm.main', run_name='__main__', alter_sys=True)
