"""Imported by every Python that has this folder on its path: a thread writes the bytes that malloc has given out to the file
that the variable HELD names, ten times a second. glibc alone has the function."""
import ctypes
import os
import sys
import threading
import time


class Mallinfo2(ctypes.Structure):
  _fields_ = [(name, ctypes.c_size_t) for name in (
    'arena', 'ordblks', 'smblks', 'hblks', 'hblkhd', 'usmblks', 'fsmblks', 'uordblks', 'fordblks', 'keepcost')]

# The table of interned strings doubles once while a run goes, from 1.9 to 3.8 MB, at a step that depends on what has been
# imported. It grows here, and these keep it large.
INTERNED = [sys.intern(f'interned {i}') for i in range(200_000)] if 'HELD' in os.environ else []


def follow(path: str):
  function = ctypes.CDLL(None).mallinfo2
  function.restype = Mallinfo2
  file = os.open(path, os.O_WRONLY | os.O_CREAT)
  while True:
    seen = function()
    os.pwrite(file, f'{seen.uordblks + seen.hblkhd:20d}'.encode(), 0)   # of all arenas, and mapped by themselves
    time.sleep(0.1)


if 'HELD' in os.environ: threading.Thread(target=follow, args=(os.environ['HELD'],), daemon=True).start()
