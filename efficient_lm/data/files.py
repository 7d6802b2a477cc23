"""Documents: found in folders, put in order and divided by hashes of their names.

Order and side of a document depend on its own name alone: adding a file moves no other one.
"""
import dataclasses
import errno
import functools
import glob
import hashlib
import os
from collections.abc import Iterable, Iterator
from typing import NamedTuple

_NOT_SOURCE = {'site-packages', 'dist-packages', '__pycache__', 'idle_test', 'test', 'tests', 'testing'}


class Document(NamedTuple):
  """One document of a corpus."""
  name: str  # relative, with '/' on every system: equal on every machine
  content: bytes  # bytes, so that a file in a broken encoding is just another document
  is_cut: bool = False  # whether max_bytes left its end out


@dataclasses.dataclass(frozen=True)
class Text:
  """A corpus. Of files: no content is on both sides, none is empty, none appears twice (see `distinct`).

  Attributes:
    train, heldout: the documents.
    left_out: what belongs here and could not be read, in words or as file names.
  """
  train: tuple[Document, ...]
  heldout: tuple[Document, ...]
  left_out: tuple[str, ...] = ()

  @functools.cached_property
  def hash(self) -> str:
    """sha256 over the names and the contents of both sides, in order; 64 hexadecimal digits."""
    digest = hashlib.sha256()
    for side, documents in (('train', self.train), ('heldout', self.heldout)):
      for name, content, _ in documents:
        # Lengths in front, so that no two different corpora feed the same bytes.
        digest.update(f'{side} {len(name)} {name} {len(content)} '.encode('utf-8', 'surrogateescape'))
        digest.update(content)
    return digest.hexdigest()


def place(name: str, purpose: str) -> float:
  """A number in [0, 1) that depends on the name alone; another `purpose` gives an independent one."""
  digest = hashlib.sha256(f'{purpose}/{name}'.encode('utf-8', 'surrogateescape')).digest()
  return int.from_bytes(digest[:6], 'big') / 2**48


def in_order(names: Iterable[str]) -> list[str]:
  """The names shuffled by their hashes: any prefix is a fair sample, which an alphabetical one is not."""
  return sorted(names, key=lambda name: (place(name, 'order'), name))


def python_files(root: str, folders: Iterable[str] = ('',), left_out: list[str] | None = None) -> Iterator[tuple[str, str]]:
  """(name relative to root, path) of every *.py under the folders of root; no tests, packages, links.

  The names of folders that cannot be listed are added to `left_out`.
  """
  relative = lambda path: os.path.relpath(path, root).replace(os.sep, '/')
  unlisted = None if left_out is None else lambda error: left_out.append(relative(error.filename))
  for folder in folders:
    start = os.path.join(root, folder)
    walk = os.walk(start, onerror=unlisted) if os.path.isdir(start) else [(root, [], [folder + '.py'])]
    for where, children, files in walk:
      children[:] = [child for child in children if child not in _NOT_SOURCE]
      for file in files:
        path = os.path.join(where, file)
        if file.endswith('.py') and os.path.isfile(path) and not os.path.islink(path): yield relative(path), path


def named(pattern: str) -> list[str]:
  """The files that a path or a pattern names, absolute and sorted; a name that exists is itself, even with brackets in it.

  As in a shell, `*` passes over hidden files; folders are passed over too. Raises OSError for what the pattern covers and
  nobody can read: a link to nothing, a folder that cannot be listed.
  """
  pattern = _absolute(pattern)
  if os.path.lexists(pattern): found = {pattern}
  else:
    _list_folders(pattern)  # glob takes a folder that it cannot list for an empty one
    found = set(glob.glob(pattern, recursive=True))
  found = sorted(path for path in found if not os.path.isdir(path))
  for path in found:
    if not os.path.isfile(path): raise FileNotFoundError(errno.ENOENT, 'no regular file', path)
  return found


def fixed_folder(pattern: str) -> str:
  """The folder in which a pattern begins: its path, absolute, up to the first part with `*`, `?` or `[`, or to the file."""
  folder = os.path.dirname(_absolute(pattern))
  while glob.has_magic(folder): folder = os.path.dirname(folder)
  return folder


def _absolute(pattern: str) -> str:
  return os.path.abspath(os.path.expanduser(pattern))


def _list_folders(pattern: str):
  folder, last = os.path.split(pattern)
  several = glob.has_magic(folder)
  if several: _list_folders(folder)
  if not glob.has_magic(last): return
  for each in glob.glob(folder, recursive=True) if several else [folder]:
    if os.path.isdir(each): os.scandir(each).close()


def read(files: dict[str, str], max_bytes: int, left_out: list[str] | None = None) -> list[Document]:
  """Reads {name: path} in hash order until `max_bytes`, the last one cut.

  The names of files that cannot be read are added to `left_out`; without that list they raise OSError.
  """
  documents, left = [], max_bytes
  for name in in_order(files):
    if left <= 0: break
    try:
      with open(files[name], 'rb') as file:
        size = os.fstat(file.fileno()).st_size   # a buffer of `left` bytes would be made at once
        content, more = file.read(min(left, size)), file.read(1)
    except OSError as error:
      error.filename = files[name]  # an error while reading has none
      if left_out is None: raise
      left_out.append(name)
      continue
    documents.append(Document(name, content, is_cut=bool(more)))
    left -= len(content)
  return documents


def divide(documents: list[Document], fraction: float) -> Text:
  """Holds about `fraction` of the documents out, each by its own name; a single document is cut at its end instead.

  The side of a document depends on others only where one side would be empty: if no document falls under the fraction,
  the one that comes nearest is held out; if all do, the one that comes last is trained on.
  """
  unique = {}
  for document in documents:
    if document.content: unique.setdefault(document.name, document)
  documents = list(unique.values())
  if len(documents) == 1: return cut(documents[0], fraction)
  names = sorted((place(document.name, 'heldout'), document.name) for document in documents)
  count = min(max(sum(number < fraction for number, _ in names), 1), len(names) - 1)
  heldout = {name for _, name in names[:max(count, 0)]}
  sides = {True: [], False: []}
  for document in documents: sides[document.name in heldout].append(document)
  return distinct(train=sides[False], heldout=sides[True])


def cut(document: Document, fraction: float) -> Text:
  """Holds the last `fraction` of one document out, from the start of a line or at least of a character."""
  content = document.content
  middle = int(len(content) * (1 - fraction))
  line = content.rfind(b'\n', 0, middle) + 1
  if line > middle // 2: middle = line
  while 0 < middle < len(content) and content[middle] & 0xC0 == 0x80: middle -= 1
  return distinct([Document(document.name, content[:middle])], [Document(document.name + '#end', content[middle:])])


def distinct(train: Iterable[Document], heldout: Iterable[Document]) -> Text:
  """Drops empty documents and repeated contents; of a content on both sides, the held-out copy stays.

  What `max_bytes` left of a document is a repetition too if a document of the other side begins with it.
  """
  seen = {hashlib.sha256(b'').digest()}

  def new(document: Document) -> bool:
    digest = hashlib.sha256(document.content).digest()
    if digest in seen: return False
    seen.add(digest)
    return True

  heldout = list(filter(new, heldout))
  train = list(filter(new, train))
  begins_one = lambda document, others: document.is_cut and any(o.content.startswith(document.content) for o in others)
  return Text(train=tuple(document for document in train if not begins_one(document, heldout)),
              heldout=tuple(document for document in heldout if not begins_one(document, train)))
