"""What a run writes while it goes: `metrics.jsonl` for programs, TensorBoard for people.

Over all trainings of a run there is one axis: a step of the second training follows the last of the first. Each row of
metrics.jsonl has its `stage` beside its `step`. Both files stay monotone across a kill and a resume: rows of what is about
to be done again are cut off. Each row ends with a checksum of its own text, so that one that was damaged is told from the
others, which stay.
"""
import json
import logging
import math
import os
import re
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from efficient_lm.runs import writing
from efficient_lm.system import sealed
from efficient_lm.system import workdir as workdirs

log = logging.getLogger(__name__)
METRICS, ASIDE = 'metrics.jsonl', 'metrics.jsonl.damaged'
SUM = re.compile(rb'(.*), "crc32": (\d+)}', re.DOTALL)
LONGEST = 64 << 20   # bytes of a row
LARGEST = 2 ** 63    # of whole numbers

CURVES = 512   # of one array; TensorBoard's page has no room for more, and writing them takes a while
LAST_BIN = 9e19   # of tensorboardX
END = 'stage_end'   # marks the row of what a stage has left, which is measured again if the stage was not committed


class Tracker:
  """Writes under `workdir`. In a program of several processes only the first one writes; the others' calls do nothing.

  stage, step: where the run goes on, the step over all trainings; what was logged of later ones is cut, and so is what was
  measured of this stage's end, which is step `end`.
  """

  def __init__(self, workdir, stage: int = 1, step: int = 0, end: int = 0):
    import jax  # here, so that a report can read metrics without loading it
    self.path, self.file, self.board = Path(workdir) / METRICS, None, None
    if jax.process_index(): return
    import tensorboardX
    from tensorboardX import record_writer
    record_writer.register_writer_factory(LASTING, Lasting)
    logging.getLogger('tensorboardX.x2num').setLevel(logging.ERROR)   # NaN is logged on purpose here
    self.workdir = workdir
    with writing.needed(self.path):
      cut(workdir, stage, step, end)
      self.file = workdirs.append(workdir, METRICS)
      board = workdirs.folder(workdir, 'tensorboard')
    # The suffix keeps two starts within a second from sharing, and emptying, one file.
    self.board = tensorboardX.SummaryWriter(f'{LASTING}:{board}', purge_step=step + 1 if step else 0,
                                            flush_secs=30, filename_suffix=f'.{stage:02d}.{step:010d}')

  def scalars(self, step: int, values: dict, stage: int = 1, end: bool = False):
    """One row of metrics.jsonl: {'step': …, 'stage': …, name: number …}. NaN and infinities, which JSON cannot hold, are
    null there, and the row's `not_finite` says what they were. An array (the expert load, say) becomes nested lists there,
    and in TensorBoard a curve an element, 'load/2/5' for expert 5 of layer 2; beyond CURVES elements the picture alone has
    to do. A text, such as a hash, is in metrics.jsonl only. `end`: this is what the stage has left."""
    if self.file is None: return
    values = {name: np.asarray(value).tolist() for name, value in values.items()}
    plain = {name: _json(value) for name, value in values.items()}
    bad = {name: _json(value, str) for name, value in values.items() if plain[name] != value}
    marks = ({END: True} if end else {}) | ({'not_finite': bad} if bad else {})
    row = {'step': int(step), 'stage': int(stage), **plain, **marks}
    workdirs.still_held(self.workdir)
    line = _line(json.dumps(row, allow_nan=False).encode())
    with writing.dispensable(self.path): _append(self.file, line + b'\n')
    for name, value in values.items():
      array = np.asarray(value)
      if array.size > CURVES or isinstance(value, str): continue
      for index, element in np.ndenumerate(array):
        self.board.add_scalar('/'.join([name, *map(str, index)]), float(element), step)

  def has(self, step: int, name: str, stage: int = 1) -> bool:
    """Whether a number of this name has been written of a step."""
    return any(name in row and (row.get('stage', 1), row['step']) == (stage, step) for row in read(self.path))

  def histogram(self, step: int, name: str, values):
    """Of those values that are finite, of which there may be none."""
    values = np.asarray(values, np.float32).ravel()
    values = np.clip(values[np.isfinite(values)], -LAST_BIN, LAST_BIN)
    if self.board and values.size: self.board.add_histogram(name, values, step)

  def image(self, step: int, name: str, image_HWC):
    """image_HWC: uint8, height x width x 3."""
    if self.board: self.board.add_image(name, np.asarray(image_HWC), step, dataformats='HWC')

  def text(self, step: int, name: str, text: str):
    """Shown verbatim, with its line breaks (TensorBoard reads Markdown, where four spaces begin a literal block)."""
    if self.board: self.board.add_text(name, '\n'.join('    ' + line for line in text.split('\n')), step)

  def hparams(self, settings: dict, metrics: dict):
    """Settings (flat: 'train.steps' …) beside what came of them, for TensorBoard's table over runs."""
    if not self.board: return
    plain = {name: value if isinstance(value, (bool, int, float, str)) else str(value) for name, value in settings.items()}
    # Names of their own: under that of a curve they would be a point of it, at step 0.
    self.board.add_hparams(plain, {f'result/{name}': float(value) for name, value in metrics.items()}, name='hparams')

  def close(self):
    if self.file is None: return
    with writing.dispensable(self.path): self.file.close()
    self.board.close()


def _append(file, data: bytes):
  """To an unbuffered file, all of it or nothing: what follows a torn line or record is not read. Raises OSError."""
  size = file.seek(0, os.SEEK_END)
  try:
    while data: data = data[file.write(data):]
  except OSError:
    file.truncate(size)
    raise


LASTING = 'lasting'   # in front of a path for TensorBoard: its files are written by the class below


class Lasting:
  """A file of TensorBoard. Its writer is a thread that ends with the first error, after which whoever adds something waits
  for it forever: so what cannot be written is left out, and said once."""

  def __init__(self, path: str):
    self.path, self.file, self.pieces = Path(path.removeprefix(f'{LASTING}:')), None, []
    with self._dispensable():
      self.file = workdirs.append(self.path.parent, self.path.name)   # no other has its name

  @classmethod
  def open(cls, path: str) -> 'Lasting':
    return cls(path)

  @classmethod
  def directory_check(cls, path: str):
    """It is made with its first file."""

  def _dispensable(self):
    return writing.dispensable(self.path.parent)

  def write(self, piece: bytes):
    """A quarter of a record: length and data, each with its checksum."""
    self.pieces.append(piece)
    if len(self.pieces) < 4: return
    record, self.pieces = b''.join(self.pieces), []
    if self.file is None: return
    with self._dispensable(): _append(self.file, record)

  def flush(self): pass

  def close(self):
    """As files are."""
    if self.file is not None:
      with self._dispensable(): self.file.close()


def _json(value, other=lambda number: None):
  """The value with what JSON cannot hold as `other` has it."""
  if isinstance(value, list): return [_json(item, other) for item in value]
  if isinstance(value, str): return value
  return value if math.isfinite(value) else other(value)


def _number(value):
  """The inverse of `_json` with `str`."""
  return [_number(item) for item in value] if isinstance(value, list) else float(value)


def read(path) -> list[dict]:
  """Rows of a metrics.jsonl, numbers as numbers (NaN too). Lines that are no row, such as one torn by a kill, or not what
  was written, are left out, with a warning that says how many."""
  rows = [row for _, row in _scan(path)]
  if None in rows: log.warning('%s has damaged lines, which are left out: %d', path, rows.count(None))
  return [row for row in rows if row is not None]


def cut(workdir, stage: int, step: int, end: int = 0):
  """Removes from metrics.jsonl what comes after `step` of `stage`, what was measured of this stage's end (step `end`), and a
  torn last line: written beside it, then renamed over it. Damaged lines go to a file beside, and a warning says how many."""
  path = Path(workdir) / METRICS
  place = lambda row: (row.get('stage', 1), row['step'])
  before = lambda row: place(row) <= (stage, step) and not (END in row and place(row) >= (stage, end))
  found = list(_scan(path))
  damaged = [line for line, row in found if row is None]
  if damaged:
    log.warning('%s has damaged lines, which are left out, and kept in %s: %d', path, ASIDE, len(damaged))
    with workdirs.append(workdir, ASIDE) as aside: aside.write(b''.join(line + b'\n' for line in damaged))
  kept = [line if SUM.fullmatch(line) else _line(line) for line, row in found if row is not None and before(row)]
  if step and not kept: log.warning('%s has no rows of what was done before step %d, from which the run goes on', path, step)
  if not found: return
  workdirs.write(workdir, METRICS, b''.join(line + b'\n' for line in kept))


def _line(text: bytes) -> bytes:
  """A row as a line has it: with the checksum of its text as its last entry."""
  return text[:-1] + b', "crc32": %d}' % zlib.crc32(text)


def _scan(path) -> Iterator[tuple[bytes, dict | None]]:
  """The lines of a metrics.jsonl, each with its row, or None where that is not what was written. In a file of an earlier
  version no line has a checksum."""
  summed = any(map(SUM.fullmatch, _lines(path)))
  for line in _lines(path):
    try: yield line, _row(line, summed)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError): yield line, None


def _lines(path) -> Iterator[bytes]:
  """Without their ends. A line that has none comes in pieces."""
  if not Path(path).is_file(): return
  with open(path, 'rb') as file:
    for line in iter(lambda: file.readline(LONGEST), b''): yield line.removesuffix(b'\n')


def _row(line: bytes, summed: bool) -> dict:
  """Raises ValueError, TypeError, KeyError, AttributeError or RecursionError for what is no row, or not what was written."""
  found = SUM.fullmatch(line)
  if found: line = found[1] + b'}'
  if summed and not (found and zlib.crc32(line) == int(found[2])): raise ValueError('not what was written')
  row = sealed.parse(line, strict=False)
  if type(row['step']) is not int or type(row.get('stage', 1)) is not int: raise ValueError('no row')
  if any(isinstance(value, int) and abs(value) > LARGEST for value in row.values()): raise ValueError('no row')
  bad = row.pop('not_finite', None)
  # Earlier versions wrote texts in place of such numbers.
  bad = bad or {name: value for name, value in row.items() if value in ('nan', 'inf', '-inf')}
  return row | {name: _number(value) for name, value in bad.items()}


def load_heatmap(load_LE) -> np.ndarray:
  """Expert load as a picture: uint8, height x width x 3; a row a layer, a column an expert.

  load_LE: share of the routed tokens times the number of experts: 1 is balanced (white). Colours are the same in every
  picture, so that pictures of different steps and runs compare: blue down to a quarter, red up to four times the
  balanced load; an expert that is never chosen is black.
  """
  from matplotlib import colormaps
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.colors import ListedColormap
  from matplotlib.figure import Figure
  load_LE = np.atleast_2d(np.asarray(load_LE, np.float64))
  layers, experts = load_LE.shape
  width, height = np.clip(0.45 * experts, 4, 12), np.clip(0.3 * layers, 0.9, 6)   # inches of the grid alone
  total_width, total_height = width + 1.5, height + 1.0
  figure = Figure(figsize=(total_width, total_height), dpi=110)
  canvas = FigureCanvasAgg(figure)
  plot = figure.add_axes((0.65 / total_width, 0.55 / total_height, width / total_width, height / total_height))
  side = figure.add_axes(((0.77 + width) / total_width, 0.55 / total_height, 0.14 / total_width, height / total_height))
  octaves = np.ma.log2(load_LE)   # masked where the load is 0
  colors = ListedColormap(colormaps['RdBu_r'](np.linspace(0.1, 0.9, 256)), 'load').with_extremes(bad='black')
  image = plot.imshow(octaves, colors, vmin=-2, vmax=2, aspect='auto', interpolation='nearest')
  plot.set_title(f'expert load (1 is balanced): largest {load_LE.max():.2f}, '
                 f'never chosen {np.sum(load_LE == 0)} of {load_LE.size}', fontsize=9, loc='left')
  plot.set(xlabel='expert', ylabel='layer')
  for axis, count in ((plot.xaxis, experts), (plot.yaxis, layers)): axis.set_ticks(range(0, count, -(-count // 16)))
  bar = figure.colorbar(image, cax=side)
  bar.set_ticks(range(-2, 3), labels=['1/4', '1/2', '1', '2', '4'])
  canvas.draw()
  return np.asarray(canvas.buffer_rgba())[..., :3].copy()
