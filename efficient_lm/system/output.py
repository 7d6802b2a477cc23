"""Standard output and error that a program outlives: hours of training are worth more than what is printed of them.

The reader of a pipe goes away, as `head` does; a terminal is closed; a disk that the output goes to is full; the streams
were closed when the program began. What cannot be written is dropped, and the program goes on.
"""
import contextlib
import errno
import io
import os
import sys

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)   # the stream itself is there, and may take the next line


class Dropping(io.FileIO):
  """Writes what can be written to a descriptor. Once its reader is gone, the descriptor is that of nowhere, for all parts of
  the program."""

  def write(self, data):
    try: return super().write(data)
    except OSError as error:
      if error.errno not in FULL: _lead_nowhere(self.fileno())
      return len(data)


def outlive():
  """Has standard output and error drop what they cannot write. Descriptors that were closed lead nowhere: or the next file
  that is opened would be taken for standard output."""
  for descriptor in (0, 1, 2):
    try: os.fstat(descriptor)
    except OSError: _lead_nowhere(descriptor)
  sys.stdout, sys.stderr = _stream(1, sys.stdout), _stream(2, sys.stderr)


def _lead_nowhere(descriptor: int):
  nowhere = os.open(os.devnull, os.O_RDWR)
  if nowhere == descriptor: return
  os.dup2(nowhere, descriptor)
  os.close(nowhere)


def _stream(descriptor: int, before) -> io.TextIOWrapper:
  """As Python makes them, but for characters that the encoding lacks, which are no reason to stop either."""
  if before is not None:
    with contextlib.suppress(OSError): before.flush()
  encoding, errors = getattr(before, 'encoding', 'utf-8'), getattr(before, 'errors', 'strict')
  raw = Dropping(descriptor, 'w', closefd=False)
  return io.TextIOWrapper(io.BufferedWriter(raw), encoding, 'backslashreplace' if errors == 'strict' else errors,
                          line_buffering=descriptor == 2 or raw.isatty())
