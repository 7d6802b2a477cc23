"""Trees of modules: one spelling of paths, and the one way to rewrite a part of a model."""
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax

from efficient_lm.errors import IncompatibleError


def path_name(path) -> str:
  """'stacks/0/blocks/mlp/up': the only spelling of a path in this project (Module and State spell theirs differently)."""
  return jax.tree_util.keystr(path, simple=True, separator='/')


def is_variable(node) -> bool:
  """Whether a node of a tree is an `nnx.Variable`, told by its metadata."""
  return hasattr(node, 'get_metadata')


def select(tree, kind: type, where: str = '') -> Iterator[tuple[str, Any]]:
  """The outermost nodes of type `kind` whose path matches the regular expression `where`, with their paths."""
  for path, node in jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda node: isinstance(node, kind)):
    if isinstance(node, kind) and re.search(where, path_name(path)): yield path_name(path), node


def rewrite(tree, kind: type, change: Callable[[str, Any], Any], where: str = ''):
  """Replaces every node that `select` finds by `change(path, node)`. A selector that finds nothing raises
  IncompatibleError."""
  found = []
  def visit(path, node):
    if not (isinstance(node, kind) and re.search(where, path_name(path))): return node
    found.append(path)
    return change(path_name(path), node)
  result = jax.tree_util.tree_map_with_path(visit, tree, is_leaf=lambda node: isinstance(node, kind))
  names = ' or '.join(one.__name__ for one in (kind if isinstance(kind, tuple) else (kind,)))
  if not found: raise IncompatibleError(f'no {names} on a path that matches {where!r}; {_paths(tree, kind)}')
  return result


def _paths(tree, kind: type) -> str:
  names = [name for name, _ in select(tree, kind)]
  return f'the paths are {", ".join(names[:8])}{" …" if len(names) > 8 else ""}' if names else 'the tree has none at all'


def size(tree) -> int:
  """Number of elements of all arrays (or shapes) in `tree`."""
  return sum(leaf.size for leaf in jax.tree.leaves(tree) if hasattr(leaf, 'size'))


def num_bytes(tree) -> int:
  """Bytes of all arrays (or shapes) in `tree` as stored."""
  return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree) if hasattr(leaf, 'dtype'))
