"""Which indices of a model's dimensions stay, by scores of their importance."""
from collections.abc import Mapping
from typing import Any

import numpy as np

from efficient_lm import tree
from efficient_lm.compression.dimensions import Space, spaces
from efficient_lm.models.moe.layer import MoE


def best(score, count: int) -> np.ndarray:
  """Indices of the `count` largest of the last dimension, in ascending order; of equal ones those that come first."""
  order = np.argsort(-np.asarray(score, np.float64), axis=-1, kind='stable')
  return np.sort(order[..., :count], axis=-1).astype(np.int32)


def chosen(model, left: Mapping[Space, int], scores: Mapping[Space, Any]) -> dict[Space, np.ndarray]:
  """What is kept of each space that is to be made smaller: (*lead, count) indices. `left`: as `dimensions.counts`; `scores`:
  (*lead, size), of heads alone where they come with key-value heads, whose score is the sum of theirs."""
  kept, owners = {}, {(space.kind, space.owner): space for space in spaces(model)}
  routers = {path: layer.route for path, layer in tree.select(model, MoE)}
  for space, count in left.items():
    if space.kind == 'kv_heads': continue   # with their query heads
    if space.kind == 'experts': kept[space] = of_router(routers[space.owner], scores[space], count)
    elif space.kind != 'heads' or ('kv_heads', space.owner) not in owners: kept[space] = best(scores[space], count)
    else:
      group = owners['kv_heads', space.owner]
      groups = best(by_group(scores[space], group.size).sum(-1), left.get(group, group.size))
      kept[space] = of_groups(scores[space], group.size, groups, count)
      if group in left: kept[group] = groups
  return kept


def unscored(left: Mapping[Space, int]) -> dict[Space, np.ndarray]:
  """Scores that are all the same: what comes first stays."""
  return {space: np.zeros((*space.lead, space.size), np.float32) for space in left}


def by_group(score, groups: int) -> np.ndarray:
  """(…, N) -> (…, groups, N / groups)."""
  score = np.asarray(score, np.float64)
  return score.reshape(*score.shape[:-1], groups, -1)


def of_groups(score, groups: int, kept, count: int) -> np.ndarray:
  """The `count` members, equally many of each of the groups (…, count of them) that are kept, the best of each."""
  score = by_group(score, groups)
  size = score.shape[-1]
  within = best(np.take_along_axis(score, kept[..., None], axis=-2), count // kept.shape[-1])
  return (kept[..., None] * size + within).reshape(*kept.shape[:-1], count).astype(np.int32)


def of_router(router, score, count: int) -> np.ndarray:
  """The experts that stay: the best; of a router with groups the best of each group, or, where those do not divide, the
  groups with the largest sums."""
  groups = getattr(router, 'num_groups', 1)
  if groups == 1: return best(score, count)
  every, size = np.broadcast_to(np.arange(groups), (*np.shape(score)[:-1], groups)), np.shape(score)[-1] // groups
  if count % groups == 0: return of_groups(score, groups, every, count)
  return of_groups(score, groups, best(by_group(score, groups).sum(-1), count // size), count)
