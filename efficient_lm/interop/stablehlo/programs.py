"""A model as two programs that take and give plain arrays: one reads prompts, the other one more token of each sequence.

  prefill(*weights, tokens (batch, tokens), lengths (batch,))       -> logits (batch, vocabulary), *cache
  decode(*weights, tokens (batch,), starts (batch,), *cache)        -> logits (batch, vocabulary), *cache

Prompts are filled up on the right to the length of the longest; `lengths` are their own. `starts` are the slots in the cache
that the tokens take: as many as the sequence has had tokens before. Logits are those after the last token of each sequence,
float32. Weights are the arrays of the model as it stores them, in few bits or not, and the cache is the leaves of its tree:
a reader needs to know the tree of neither.

Programs are traced for devices of every kind, whichever is here (`ops.dispatch.portable`), and for no mesh.
"""
import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import export

from efficient_lm.errors import IncompatibleError
from efficient_lm.models import decode
from efficient_lm.ops import dispatch
from efficient_lm.tree import path_name

Arrays = tuple[tuple[str, jax.ShapeDtypeStruct], ...]   # names and shapes, in order


@dataclasses.dataclass(frozen=True)
class Sizes:
  """batch: of sequences, a number or a symbolic dimension. length: slots of a sequence in the cache. vocab_size: of the
  tokenizer. cache: its format."""
  batch: Any
  length: int
  vocab_size: int
  cache: Any


@dataclasses.dataclass(frozen=True)
class Program:
  """A function of arrays alone, run(*weights, *arguments) -> results."""
  run: Callable
  weights: Arrays
  arguments: Arrays
  results: tuple[str, ...]

  def export(self, platforms: tuple[str, ...]) -> export.Exported:
    """Traced and lowered for these platforms ('cpu', 'cuda', 'rocm', 'tpu'); the weights are shapes to it."""
    shapes = [shape for _, shape in (*self.weights, *self.arguments)]
    # Every argument stays one, even where nothing reads it: the order is the one that is written down.
    with _anywhere(): return export.export(jax.jit(self.run, keep_unused=True), platforms=platforms)(*shapes)


def weights_of(model) -> list[tuple[str, jax.Array]]:
  """The arrays of a model by their paths, in the order in which programs take them."""
  return [(path_name(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(model)]


def prefill(model, sizes: Sizes, tokens) -> Program:
  """See above; tokens: of the longest prompt, a number or a symbolic dimension. Raises IncompatibleError for a cache that
  the model cannot have."""
  weights, structure = _shapes(weights_of(model)), jax.tree.structure(model)
  def run(*arrays):
    *leaves, tokens_BT, lengths_B = arrays
    logits_BV, slots = decode.prefill(jax.tree.unflatten(structure, leaves), tokens_BT, lengths_B, length=sizes.length,
                                      vocab_size=sizes.vocab_size, cache=sizes.cache)
    return logits_BV, *jax.tree.leaves(slots)
  ids = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)
  own = ('tokens', ids(sizes.batch, tokens)), ('lengths', ids(sizes.batch))
  return Program(run, weights, own, ('logits', *[name for name, _ in _cache(model, sizes)[0]]))


def decode_step(model, sizes: Sizes) -> Program:
  """See above, `decode`. Raises IncompatibleError for a cache that the model cannot have."""
  weights, structure = _shapes(weights_of(model)), jax.tree.structure(model)
  slots, slots_structure = _cache(model, sizes)
  def run(*arrays):
    leaves, (tokens_B, starts_B, *kept) = arrays[:len(weights)], arrays[len(weights):]
    outputs = jax.tree.unflatten(structure, leaves)(tokens_B[:, None], cache=jax.tree.unflatten(slots_structure, kept),
                                                    start=starts_B)
    return outputs.logits_BTV[:, 0, :sizes.vocab_size], *jax.tree.leaves(outputs.cache)
  one = jax.ShapeDtypeStruct((sizes.batch,), jnp.int32)
  return Program(run, weights, (('tokens', one), ('starts', one), *slots), ('logits', *[name for name, _ in slots]))


def _cache(model, sizes: Sizes):
  """The names and shapes of the arrays of the cache, and its tree."""
  with _anywhere(): slots = jax.eval_shape(lambda: model.init_cache(sizes.batch, sizes.length, sizes.cache))
  named = [(f'cache/{path_name(path)}', leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(slots)]
  return _shapes(named), jax.tree.structure(slots)


def _shapes(named) -> Arrays:
  return tuple((name, jax.ShapeDtypeStruct(array.shape, array.dtype)) for name, array in named)


SOURCES = 'jax_hlo_source_file_canonicalization_regex'


@contextlib.contextmanager
def _anywhere():
  """What is traced here is for devices of every kind, and for one of them, whatever mesh is in force. The files that it
  names as its sources have no folders: those of this machine must not travel with a model."""
  before = getattr(jax.config, SOURCES)
  one = jax.make_mesh((1,), ('alone',), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.local_devices()[:1])
  with dispatch.portable(), jax.set_mesh(one):
    jax.config.update(SOURCES, '.*/')
    try: yield
    except jax.errors.InconclusiveDimensionOperation as error:
      raise IncompatibleError(f'a part of the model cannot be traced for any batch: {str(error).splitlines()[0]}') from error
    finally: jax.config.update(SOURCES, before)
