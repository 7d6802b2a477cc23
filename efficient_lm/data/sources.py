"""Where text comes from: plain dataclasses for configs, with `check()` (problems) and `read()` (a Text).

Everything is read as bytes. Nothing read is ever executed; only `HuggingFaceDataset` uses the network.

What a user named is read or refused: a file that cannot be read is a ConfigError. Of a tree of Python source, what cannot be
read is left out and recorded in `Text.left_out`.
"""
import contextlib
import dataclasses
import hashlib
import importlib.util
import io
import json
import os
import sysconfig
from collections.abc import Iterator
from typing import Any

from efficient_lm.data import files
from efficient_lm.data.files import Document, Text
from efficient_lm.errors import ConfigError, Problem, at_least, fraction
from efficient_lm.lazy import lazy

datasets = lazy('datasets')
parquet = lazy('pyarrow.parquet')
pyarrow = lazy('pyarrow')


def _sizes(source) -> Iterator[Problem]:
  yield from at_least(source, max_bytes=1)
  yield from fraction(source, 'heldout_fraction')


@dataclasses.dataclass
class StandardLibrary:
  """The source of the running interpreter's own library: on every machine, without a download (about 12 MB).

  It differs between versions of Python: a figure from it belongs with the corpus hash. Tests are left out.
  """
  max_bytes: int = dataclasses.field(default=64_000_000, metadata={'wide': True})
  heldout_fraction: float = 0.05  # of the files

  def check(self) -> Iterator[Problem]:
    yield from _sizes(self)
    if not any(files.python_files(self._root())):
      yield 'root', self._root(), 'this Python comes without its source; use TextFiles or Markov'

  def read(self) -> Text:
    return _source_trees(self, [self._root()], ('',))

  def _root(self) -> str:
    return sysconfig.get_path('stdlib') or ''


@dataclasses.dataclass
class PythonPackages:
  """The Python source of installed packages, for runs that need more than the standard library has.

  Attributes:
    names: import names, as ('numpy', 'jax'); empty for everything that is installed.
    max_bytes: files are taken in the order of their hashes until this many bytes.
    heldout_fraction: of the files.
  """
  names: tuple[str, ...] = ()
  max_bytes: int = dataclasses.field(default=256_000_000, metadata={'wide': True})
  heldout_fraction: float = 0.05

  def check(self) -> Iterator[Problem]:
    yield from _sizes(self)
    for name in _several(self.names):
      # An identifier, so that no name walks out of the folder.
      if not name.isidentifier(): yield 'names', name, 'an import name such as numpy is needed'
      elif not any(any(files.python_files(root, [name])) for root in self._roots()):
        yield 'names', name, 'no Python source of that name is installed here'
    if not any(any(files.python_files(root)) for root in self._roots()):
      yield 'names', self.names, 'no packages are installed here; use StandardLibrary or TextFiles'

  def read(self) -> Text:
    return _source_trees(self, self._roots(), _several(self.names or ''))

  def _roots(self) -> list[str]:
    return sorted({sysconfig.get_path('purelib'), sysconfig.get_path('platlib')})


def _source_trees(source, roots: list[str], folders: tuple[str, ...]) -> Text:
  """The Python files of these folders of all roots. Of files with one name the first root's is read."""
  found, left_out = {}, []
  for root in roots:
    for name, path in files.python_files(root, folders, left_out):
      if found.setdefault(name, path) != path: left_out.append(path)
  text = files.divide(files.read(found, source.max_bytes, left_out), source.heldout_fraction)
  return dataclasses.replace(text, left_out=tuple(sorted(left_out)))


@dataclasses.dataclass
class TextFiles:
  """Your own text: one document a file.

  A document is named by its path from the folder in which the first pattern of `train` begins (for 'books/**/*.txt' that is
  'books'): its name, and so its order and its side, is the same whatever other files there are and wherever the corpus lies.

  Attributes:
    train: paths or patterns such as 'books/**/*.txt' (`**` crosses folders, `*` passes over hidden files).
    heldout: the same for evaluation, never trained on; empty: some of the files, by a hash of their names, or one's end.
    max_bytes: of the training files and, apart, of the held-out ones.
    heldout_fraction: of the files, or of the single file; read only where `heldout` is empty.
  """
  train: tuple[str, ...] = ()
  heldout: tuple[str, ...] = ()
  max_bytes: int = dataclasses.field(default=1_000_000_000, metadata={'wide': True})
  heldout_fraction: float = 0.05

  def check(self) -> Iterator[Problem]:
    yield from _sizes(self)
    if not self.train: yield 'train', self.train, "name files, as ('books/*.txt',)"
    for field in ('train', 'heldout'):
      for pattern in _several(getattr(self, field)): yield from _unmatched(field, pattern)

  def read(self) -> Text:
    train, heldout = self._find('train'), self._find('heldout')
    if not heldout: return files.divide(self._read('train', train), self.heldout_fraction)
    train = {name: path for name, path in train.items() if name not in heldout}
    return files.distinct(self._read('train', train), self._read('heldout', heldout))

  def _find(self, field: str) -> dict[str, str]:
    """{name: path}. One folder for the names of both fields: different files never share one."""
    with _refused(field): paths = [path for pattern in _several(getattr(self, field)) for path in files.named(pattern)]
    root = files.fixed_folder(next(iter(_several(self.train)), ''))
    return {os.path.relpath(path, root).replace(os.sep, '/'): path for path in paths}

  def _read(self, field: str, found: dict[str, str]) -> list[Document]:
    with _refused(field): return files.read(found, self.max_bytes)


@dataclasses.dataclass
class HuggingFaceDataset:
  """A data set of the Hugging Face hub, or local .json, .jsonl, .parquet and .txt files (also .gz and .zst).

  Only data is read: a data set that needs its own code is refused. Local files are read as they are, without the package
  `datasets`, which would take brackets in a name for a pattern, translate line ends, turn text that looks like a date into
  one, and serve a changed file from its cache. A row is named by its content: its side is the same wherever it stands.

  Attributes:
    path: a hub name such as 'roneneldan/TinyStories', or a local path or pattern.
    name: the hub's configuration ('wikitext-2-raw-v1'), if it has several.
    revision: the commit or tag of the hub's repository; empty for the newest.
    column: where the text is; one document a row. A .txt file is one row.
    train: the split to train on; local files have 'train' only.
    heldout: the split to evaluate on, a path for local files; empty: some rows, by a hash of their contents.
    max_bytes: read of each split.
    heldout_fraction: of the rows; read only where `heldout` is empty.
  """
  path: str = ''
  name: str = ''
  revision: str = ''
  column: str = 'text'
  train: str = 'train'
  heldout: str = ''
  max_bytes: int = dataclasses.field(default=256_000_000, metadata={'wide': True})
  heldout_fraction: float = 0.05

  def check(self) -> Iterator[Problem]:
    yield from _sizes(self)
    if not self.path: yield 'path', self.path, 'a hub name or a local file is needed'
    if self.path.endswith('.py') or os.path.isdir(self.path):
      yield 'path', self.path, 'code and folders are not read; name .jsonl, .parquet or .txt files'
    package = _package(self.path)
    if package and importlib.util.find_spec(package) is None:
      yield 'path', self.path, f'the package {package} is not installed; pip install datasets'
    if _format(self.path):
      for field in ('path', 'heldout'):
        if pattern := getattr(self, field): yield from _unmatched(field, pattern)

  def read(self) -> Text:
    left_out = []
    train = self._documents('path' if _format(self.path) else 'train', left_out)
    heldout = self._documents('heldout', left_out) if self.heldout else None
    text = files.divide(train, self.heldout_fraction) if heldout is None else files.distinct(train, heldout)
    return dataclasses.replace(text, left_out=tuple(left_out))

  def _documents(self, field: str, left_out: list[str]) -> list[Document]:
    documents, left, empty = [], self.max_bytes, 0
    for where, value in self._local_values(field) if _format(self.path) else self._hub_values(field):
      if left <= 0: break
      if value is None:
        empty += 1
        continue
      if not isinstance(value, str | bytes):
        raise ConfigError('data.source.column', self.column, f'holds no text: {where} has a {type(value).__name__}')
      # JSON may hold halves of surrogate pairs, which are no characters; this keeps them.
      content = value.encode('utf-8', 'surrogatepass') if isinstance(value, str) else value
      documents.append(Document(hashlib.sha256(content).hexdigest(), content[:left], is_cut=len(content) > left))
      left -= len(content)
    if empty: left_out.append(f'{empty} rows of {getattr(self, field)} without {self.column}')
    return documents

  def _local_values(self, field: str) -> Iterator[tuple[str, Any]]:
    """(where it is, value of the column) of every row of the files that `field` names."""
    with _refused(field): paths = files.named(getattr(self, field))
    for path in paths:
      with _unreadable(field, path):
        for number, value in enumerate(_values(path, self.column), start=1): yield f'row {number} of {path}', value

  def _hub_values(self, field: str) -> Iterator[tuple[str, Any]]:
    split = getattr(self, field)
    with _unreadable('path', self.path):
      rows = datasets.load_dataset(self.path, self.name or None, split=split, revision=self.revision or None)
      if self.column not in rows.column_names: raise _no_column(self.column, rows.column_names)
      for number, row in enumerate(rows.select_columns([self.column])): yield f'row {number} of {split}', row[self.column]


def _values(path: str, column: str) -> Iterator[Any]:
  """The values of a column of a local file, in order; None where a row has none."""
  form = _format(path)
  if form == 'parquet':
    with parquet.ParquetFile(path) as table:
      if column not in table.schema_arrow.names: raise _no_column(column, table.schema_arrow.names)
      for batch in table.iter_batches(columns=[column]): yield from batch.column(0).to_pylist()
    return
  with pyarrow.input_stream(path) if _is_compressed(path) else open(path, 'rb') as file:
    if form == 'text': yield file.read()
    else: yield from _json_values(io.BufferedReader(file) if _is_compressed(path) else file, column)


def _json_values(file, column: str) -> Iterator[Any]:
  """Of one array of objects, or of an object a line. Raises ValueError for anything else."""
  found = {}
  is_array = file.peek(1)[:1] == b'['
  for row in json.loads(file.read()) if is_array else (json.loads(line) for line in file if line.strip()):
    if not isinstance(row, dict): raise ValueError('its rows must be objects')
    found |= dict.fromkeys(row)
    yield row.get(column)
  if found and column not in found: raise _no_column(column, found)


def _format(path: str) -> str | None:
  """What a local file holds, None for a name on the hub."""
  forms = {'.json': 'json', '.jsonl': 'json', '.parquet': 'parquet', '.txt': 'text'}
  return forms.get(os.path.splitext(path.removesuffix('.gz').removesuffix('.zst'))[1])


def _is_compressed(path: str) -> bool:
  return path.endswith(('.gz', '.zst'))


def _package(path: str) -> str | None:
  """The package that reads this, if it needs one."""
  if _format(path) is None: return 'datasets'
  return 'pyarrow' if _format(path) == 'parquet' or _is_compressed(path) else None


def _no_column(column: str, names) -> ConfigError:
  return ConfigError('data.source.column', column, f'choose among {", ".join(names)}')


def _unmatched(field: str, pattern: str) -> Iterator[Problem]:
  """Complains of a pattern that names no file, or one that cannot be read."""
  try:
    if files.named(pattern): return
    yield field, pattern, 'is a folder; write folder/**/*.txt' if os.path.isdir(pattern) else 'no such file'
  except OSError as error:
    yield field, error.filename, f'cannot be read: {error.strerror}'


@contextlib.contextmanager
def _refused(field: str):
  """A file that cannot be read is one line that names it."""
  try: yield
  except OSError as error:
    raise ConfigError(f'data.source.{field}', error.filename, f'cannot be read: {error.strerror}') from error


@contextlib.contextmanager
def _unreadable(field: str, path: str):
  """Whatever goes wrong inside is one line. Packages raise many kinds of errors, from their own to pyarrow's."""
  try: yield
  except ConfigError: raise
  except Exception as error:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    raise ConfigError(f'data.source.{field}', path, f'cannot be read: {reason}') from error


def _several(names: tuple[str, ...] | str) -> tuple[str, ...]:
  """A lone string is one name: taken as a tuple it would be a name a letter."""
  return (names,) if isinstance(names, str) else tuple(names)
