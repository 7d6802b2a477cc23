"""Where text comes from: plain dataclasses for configs, with `check()` (complaints) and `read()` (a Text).

Everything is read as bytes. Nothing read is ever executed; only `HuggingFaceDataset` uses the network.
"""
import dataclasses
import glob
import importlib.util
import os
import sysconfig
from collections.abc import Iterator

from efficient_lm.data import cache, files
from efficient_lm.data.files import Document, Text
from efficient_lm.errors import Complaint, ConfigError, not_fraction, too_small
from efficient_lm.lazy import lazy

datasets = lazy('datasets')


def _sizes(source) -> Iterator[Complaint]:
  yield from too_small(source, max_bytes=1)
  yield from not_fraction(source, 'heldout_fraction')


@dataclasses.dataclass
class StandardLibrary:
  """The source of the running interpreter's own library: on every machine, without a download (about 12 MB).

  It differs between versions of Python: a figure from it belongs with the corpus hash. Tests are left out.
  """
  max_bytes: int = 64_000_000
  heldout_fraction: float = 0.05  # of the files

  def check(self) -> Iterator[Complaint]:
    yield from _sizes(self)
    if not any(files.python_files(self._root())):
      yield 'root', self._root(), 'this Python comes without its source; use TextFiles or Markov'

  def read(self) -> Text:
    documents = files.read(dict(files.python_files(self._root())), self.max_bytes)
    return files.divide(documents, self.heldout_fraction)

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
  max_bytes: int = 256_000_000
  heldout_fraction: float = 0.05

  def check(self) -> Iterator[Complaint]:
    yield from _sizes(self)
    for name in _several(self.names):
      # An identifier, so that no name walks out of the folder.
      if not name.isidentifier(): yield 'names', name, 'an import name such as numpy is needed'
      elif not any(any(files.python_files(root, [name])) for root in self._roots()):
        yield 'names', name, 'no Python source of that name is installed here'
    if not any(any(files.python_files(root)) for root in self._roots()):
      yield 'names', self.names, 'no packages are installed here; use StandardLibrary or TextFiles'

  def read(self) -> Text:
    found = {}
    for root in self._roots(): found |= dict(files.python_files(root, _several(self.names or '')))
    return files.divide(files.read(found, self.max_bytes), self.heldout_fraction)

  def _roots(self) -> list[str]:
    return sorted({sysconfig.get_path('purelib'), sysconfig.get_path('platlib')})


@dataclasses.dataclass
class TextFiles:
  """Your own text: one document a file.

  Attributes:
    train: paths or patterns such as 'books/**/*.txt' (`**` crosses folders).
    heldout: the same for evaluation; empty: some of the files, by a hash of their names, or one's end.
    max_bytes: of the training files and, apart, of the held-out ones.
    heldout_fraction: of the files, or of the single file; read only where `heldout` is empty.
  """
  train: tuple[str, ...] = ()
  heldout: tuple[str, ...] = ()
  max_bytes: int = 1_000_000_000
  heldout_fraction: float = 0.05

  def check(self) -> Iterator[Complaint]:
    yield from _sizes(self)
    if not self.train: yield 'train', self.train, "name files, as ('books/*.txt',)"
    for field in ('train', 'heldout'):
      for pattern in _several(getattr(self, field)):
        if not _match(pattern):
          fix = 'is a folder; write folder/**/*.txt' if os.path.isdir(pattern) else 'no such file'
          yield field, pattern, fix

  def read(self) -> Text:
    train, heldout = self._find(self.train), self._find(self.heldout)
    if not heldout: return files.divide(files.read(train, self.max_bytes), self.heldout_fraction)
    return files.distinct(files.read(train, self.max_bytes), files.read(heldout, self.max_bytes))

  def _find(self, patterns: tuple[str, ...]) -> dict[str, str]:
    """{name: path}; names are relative to the folder that holds all: a moved corpus keeps its hash."""
    paths = sorted({path for pattern in _several(patterns) for path in _match(pattern)})
    if not paths: return {}
    root = os.path.commonpath([os.path.dirname(path) for path in paths])
    return {os.path.relpath(path, root).replace(os.sep, '/'): path for path in paths}


@dataclasses.dataclass
class HuggingFaceDataset:
  """A data set of the Hugging Face hub, or local .json, .jsonl, .parquet and .txt files, through `datasets`.

  Only data is read: a data set that needs its own code is refused.

  Attributes:
    path: a hub name such as 'roneneldan/TinyStories', or a local path or pattern.
    name: the hub's configuration ('wikitext-2-raw-v1'), if it has several.
    revision: the commit or tag of the hub's repository; empty for the newest.
    column: where the text is; one document a row.
    train: the split to train on; local files have 'train' only.
    heldout: the split to evaluate on, a path for local files; empty: some rows, by a hash of their numbers.
    max_bytes: read of each split.
    heldout_fraction: of the rows; read only where `heldout` is empty.
  """
  path: str = ''
  name: str = ''
  revision: str = ''
  column: str = 'text'
  train: str = 'train'
  heldout: str = ''
  max_bytes: int = 256_000_000
  heldout_fraction: float = 0.05

  def check(self) -> Iterator[Complaint]:
    yield from _sizes(self)
    if importlib.util.find_spec('datasets') is None:
      yield 'path', self.path, 'the package datasets is not installed; pip install datasets'
    if not self.path: yield 'path', self.path, 'a hub name or a local file is needed'
    if self.path.endswith('.py') or os.path.isdir(self.path):
      yield 'path', self.path, 'code and folders are not read; name .jsonl, .parquet or .txt files'
    if _format(self.path):
      for field in ('path', 'heldout'):
        pattern = getattr(self, field)
        if pattern and not _match(pattern): yield field, pattern, 'no such file'

  def read(self) -> Text:
    train = self._documents(self.path if _format(self.path) else self.train)
    if not self.heldout: return files.divide(train, self.heldout_fraction)
    return files.distinct(train, self._documents(self.heldout))

  def _documents(self, split: str) -> list[Document]:
    documents, left = [], self.max_bytes
    for number, row in enumerate(self._rows(split)):
      if left <= 0: break
      if row[self.column] is None: continue
      content = str(row[self.column]).encode('utf-8', 'surrogateescape')[:left]
      documents.append(Document(f'{os.path.basename(split)}/{number:09d}', content))
      left -= len(content)
    return documents

  def _rows(self, split: str):
    """The rows of a split or of local files. Whatever goes wrong inside is raised as one ConfigError."""
    try:
      if form := _format(self.path):
        options = {'sample_by': 'document'} if form == 'text' else {}
        rows = datasets.load_dataset(form, data_files={'train': _match(split)}, split='train',
                                     cache_dir=str(cache.folder() / 'datasets'), **options)
      else:
        rows = datasets.load_dataset(
            self.path, self.name or None, split=split, revision=self.revision or None)
    except Exception as error:  # the package raises many kinds, from its own to pyarrow's
      reason = (str(error).strip() or type(error).__name__).splitlines()[0]
      raise ConfigError('data.source.path', self.path, f'cannot be read: {reason}') from error
    if self.column not in rows.column_names:
      raise ConfigError('data.source.column', self.column, f'choose among {", ".join(rows.column_names)}')
    return rows.select_columns([self.column])


def _format(path: str) -> str | None:
  """The reader for a local file, None for a name on the hub."""
  readers = {'.json': 'json', '.jsonl': 'json', '.parquet': 'parquet', '.txt': 'text'}
  return readers.get(os.path.splitext(path.removesuffix('.gz').removesuffix('.zst'))[1])


def _several(names: tuple[str, ...] | str) -> tuple[str, ...]:
  """A lone string is one name: taken as a tuple it would be a name a letter."""
  return (names,) if isinstance(names, str) else tuple(names)


def _match(pattern: str) -> list[str]:
  """The files a path or a pattern names, absolute; a name that exists is itself, even with brackets in it."""
  pattern = os.path.abspath(os.path.expanduser(pattern))
  found = [pattern] if os.path.exists(pattern) else glob.glob(pattern, recursive=True)
  return [path for path in found if os.path.isfile(path)]
