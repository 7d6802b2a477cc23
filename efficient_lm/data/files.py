"""Documents: found in folders, put in order and divided by hashes of their names.

Order and side of a document depend on its own name alone: adding a file moves no other one.
"""
import dataclasses
import functools
import hashlib
import os
from collections.abc import Iterable, Iterator
from typing import NamedTuple

_NOT_SOURCE = {'site-packages', 'dist-packages', '__pycache__', 'idle_test', 'test', 'tests', 'testing'}


class Document(NamedTuple):
  """One document of a corpus."""
  name: str  # relative, with '/' on every system: equal on every machine
  content: bytes  # bytes, so that a file in a broken encoding is just another document


@dataclasses.dataclass(frozen=True)
class Text:
  """A corpus. Of files: no content is on both sides, none is empty, none appears twice (see `distinct`)."""
  train: tuple[Document, ...]
  heldout: tuple[Document, ...]

  @functools.cached_property
  def hash(self) -> str:
    """sha256 over the names and the contents of both sides, in order; 64 hexadecimal digits."""
    digest = hashlib.sha256()
    for side, documents in (('train', self.train), ('heldout', self.heldout)):
      for name, content in documents:
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


def python_files(root: str, folders: Iterable[str] = ('',)) -> Iterator[tuple[str, str]]:
  """(name relative to root, path) of every *.py under the folders of root; no tests, packages, links."""
  for folder in folders:
    start = os.path.join(root, folder)
    walk = os.walk(start) if os.path.isdir(start) else [(root, [], [folder + '.py'])]
    for where, children, files in walk:
      children[:] = [child for child in children if child not in _NOT_SOURCE]
      for file in files:
        path = os.path.join(where, file)
        if file.endswith('.py') and os.path.isfile(path) and not os.path.islink(path):
          yield os.path.relpath(path, root).replace(os.sep, '/'), path


def read(files: dict[str, str], max_bytes: int) -> list[Document]:
  """Reads {name: path} in hash order until `max_bytes`, the last one cut; what cannot be read is left out."""
  documents, left = [], max_bytes
  for name in in_order(files):
    if left <= 0: break
    try:
      with open(files[name], 'rb') as file: content = file.read(left)
    except OSError:
      continue
    documents.append(Document(name, content))
    left -= len(content)
  return documents


def divide(documents: list[Document], fraction: float) -> Text:
  """Holds about `fraction` of the documents out, by name; a single document is cut at its end instead."""
  documents = [document for document in documents if document.content]
  if len(documents) == 1: return cut(documents[0], fraction)
  names = sorted((place(document.name, 'heldout'), document.name) for document in documents)
  # Between one and all but one, so that neither side of a small corpus is empty.
  count = min(max(sum(number < fraction for number, _ in names), 1), len(names) - 1)
  heldout = {name for _, name in names[:max(count, 0)]}
  sides = {True: [], False: []}
  for document in documents: sides[document.name in heldout].append(document)
  return distinct(train=sides[False], heldout=sides[True])


def cut(document: Document, fraction: float) -> Text:
  """Holds the last `fraction` of one document out, from the start of a line or at least of a character."""
  name, content = document
  middle = int(len(content) * (1 - fraction))
  line = content.rfind(b'\n', 0, middle) + 1
  if line > middle // 2: middle = line
  while 0 < middle < len(content) and content[middle] & 0xC0 == 0x80: middle -= 1
  return distinct([Document(name, content[:middle])], [Document(name + '#end', content[middle:])])


def distinct(train: Iterable[Document], heldout: Iterable[Document]) -> Text:
  """Drops empty documents and repeated contents; of a content on both sides, the held-out copy stays."""
  seen = {hashlib.sha256(b'').digest()}

  def new(document: Document) -> bool:
    digest = hashlib.sha256(document.content).digest()
    if digest in seen: return False
    seen.add(digest)
    return True

  heldout = tuple(filter(new, heldout))
  return Text(train=tuple(filter(new, train)), heldout=heldout)
