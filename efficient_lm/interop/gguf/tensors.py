"""Tensors by the names of Hugging Face as an architecture of GGUF has them: the inverse of `names`.

Rows are moved, norms have 1 added, matrices are transposed and experts joined as converters do; a matrix in few bits keeps
its numbers, and is moved in whole rows.
"""
import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

from efficient_lm.errors import ConfigError
from efficient_lm.interop.gguf import names
from efficient_lm.interop.gguf.config import Architecture
from efficient_lm.interop.written import Stored

Array = np.ndarray | Stored
_EXPERT = re.compile(r'model\.layers\.(\d+)\.(?:mlp|block_sparse_moe)\.experts\.(\d+)\.(\w+)\.weight')
_LAYER = re.compile(r'(?:model\.layers|transformer\.h)\.(\d+)\.(.+)\.(weight|bias)')
EXPERTS = {place: stem for stem, places in names.EXPERTS.items() for place in places}
ROUTER = 'ffn_gate_inp'


class Named(NamedTuple):
  """A tensor of the file. parts: one array, or one an expert. stem: its name without layer and kind."""
  name: str
  stem: str
  parts: tuple[Array, ...]
  joined: bool = False

  @property
  def shape(self) -> tuple[int, ...]:
    return (len(self.parts), *self.parts[0].shape) if self.joined else self.parts[0].shape

  @property
  def plain(self) -> bool:
    """Whether engines want it in float32 whatever the matrices are in: vectors, positions, and what routes to experts."""
    return len(self.shape) < 2 or self.stem in (ROUTER, 'position_embd')


def named(tensors: Mapping[str, Array], config: Mapping, architecture: Architecture) -> Iterator[Named]:
  """All of a model, experts behind what else a file holds. Raises ConfigError for a name that the architecture has no place
  for."""
  experts: dict[tuple[str, str], dict[int, Array]] = {}
  for name, array in tensors.items():
    if name == 'lm_head.weight' and config.get('tie_word_embeddings'): continue
    if found := _EXPERT.fullmatch(name):
      layer, number, place = found.groups()
      if place in EXPERTS: experts.setdefault((layer, EXPERTS[place]), {})[int(number)] = array
      else: raise _no_place(name)
    else: yield _one(name, array, config, architecture)
  for (layer, stem), parts in experts.items():
    in_order = tuple(parts[number] for number in sorted(parts))
    yield Named(f'blk.{layer}.{stem}_exps.weight', f'{stem}_exps', in_order, joined=True)


def _one(name: str, array: Array, config: Mapping, architecture: Architecture) -> Named:
  if found := _LAYER.fullmatch(name):
    layer, place, kind = found.groups()
    place = place.replace('block_sparse_moe.', 'mlp.')
    stem = {place: stem for stem, place in names.LAYERS[architecture.names].items()}.get(place)
    made = f'blk.{layer}.{stem}.{kind}'
  else:
    place, _, kind = name.rpartition('.')
    stem = {place: stem for stem, place in names.ENDS[architecture.names].items()}.get(place)
    made = f'{stem}.{kind}'
  if stem is None: raise _no_place(name)
  return Named(made, stem, (_changed(array, stem, kind, config, architecture),))


def _no_place(name: str) -> ConfigError:
  return ConfigError('tensor', name, 'has no place in a GGUF file of its architecture: export a Hugging Face folder')


def _changed(array: Array, stem: str, kind: str, config: Mapping, architecture: Architecture) -> Array:
  if architecture.permuted and stem in ('attn_q', 'attn_k'):
    heads = config['num_attention_heads']
    if stem == 'attn_k': heads = config.get('num_key_value_heads') or heads
    return _rows(array, lambda rows: neighbours(rows, heads))
  if architecture.plus_one and stem.endswith('norm'): return np.asarray(array, np.float32) + np.float32(1)
  if names.is_transposed(stem, kind, architecture) and not isinstance(array, Stored): return array.T
  if stem == names.SHARED_GATE and not isinstance(array, Stored): return array.reshape(-1)
  return array


def _rows(array: Array, move) -> Array:
  """A matrix whose rows are moved, with their scales."""
  if not isinstance(array, Stored): return move(array)
  zero_OQ = None if array.zero_OQ is None else move(array.zero_OQ)
  return dataclasses.replace(array, numbers_OI=move(array.numbers_OI), step_OQ=move(array.step_OQ), zero_OQ=zero_OQ)


def neighbours(rows: np.ndarray, heads: int) -> np.ndarray:
  """The inverse of `names.halves`."""
  return rows.reshape(heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)
