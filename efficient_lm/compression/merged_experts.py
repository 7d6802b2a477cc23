"""The arithmetic of `merging.MergeExperts`: who is joined to whom, in which order of hidden units, with which weight."""
import jax
import jax.numpy as jnp
import numpy as np

from efficient_lm import tree
from efficient_lm.compression import importance
from efficient_lm.compression.dimensions import Space
from efficient_lm.errors import IncompatibleError
from efficient_lm.models.moe.layer import MoE
from efficient_lm.weights.weight import Dense, Weight


@jax.jit
def _seen(mixture: MoE, x_BTD, segments_BT):
  """Products of router logits, (E, E), and how many tokens chose each expert; both summed over tokens."""
  real_BT = segments_BT > 0
  logits_BTE = mixture.router.contract('BTD,DE->BTE', x_BTD.astype(jnp.float32)) * real_BT[..., None]
  products = jnp.einsum('BTE,BTF->EF', logits_BTE, logits_BTE, precision='highest')
  return products, mixture.routing(x_BTD, real_BT).rows_by_expert(mixture.num_experts)


def merged(model, kept: dict[Space, np.ndarray], batches, align: bool):
  """The model with experts that stay averaged with those that are joined to them, in every layer for itself."""
  spaces = [space for space in kept if space.kind == 'experts']
  if not spaces: return model
  mixtures = dict(tree.select(model, MoE))
  for space in spaces:
    for name, weight in tree.select(mixtures[space.owner].experts, Weight):
      if not isinstance(weight, Dense): raise IncompatibleError(f'{space.owner}/experts/{name} is {weight.kind}: only float '
                                                                f'experts without masks are merged')
  products = importance.of_experts(model, spaces, batches, lambda *given: (_flat(_seen(*given)), None), flat=True)
  changes = {space.owner: _joined(mixtures[space.owner], space, kept[space], products[space], align) for space in spaces}

  def change(path, mixture):
    if path not in changes: return mixture
    mixture = jax.tree.map(lambda leaf: leaf, mixture)
    for name, array in changes[path].items():
      setattr(mixture.experts, name, getattr(mixture.experts, name).replaced(jnp.asarray(array)))
    return mixture
  return tree.rewrite(model, MoE, change)


def _flat(seen):
  products, rows_E = seen
  return jnp.concatenate([products.reshape(-1), rows_E])


def _joined(mixture: MoE, space: Space, kept, seen, align: bool) -> dict[str, np.ndarray]:
  """Arrays of the experts by name, layers in front."""
  arrays = {name: np.array(getattr(mixture.experts, name).materialize()) for name in ('gate', 'up', 'down')}
  size, groups = space.size, getattr(mixture.route, 'num_groups', 1)
  for place in np.ndindex(*space.lead):
    products, rows_E = seen[place][:size * size].reshape(size, size), seen[place][size * size:]
    layer = {name: array[place] for name, array in arrays.items()}   # views: what is written there is written here
    for stays, joined in members(products, kept[place], groups).items():
      _average(layer, stays, joined, rows_E, align)
  return arrays


def members(products, kept, groups: int = 1) -> dict[int, list[int]]:
  """By expert that stays, those that are joined to it: each that goes to the one whose logits are most like its own, within
  its group, if one of it stays."""
  norms = np.sqrt(np.maximum(np.diag(products), 1e-30))
  cosine, size = products / norms[:, None] / norms, len(products) // groups
  found = {int(stays): [] for stays in kept}
  for goes in set(range(len(products))) - set(found):
    near = [stays for stays in found if stays // size == goes // size] or list(found)
    found[max(near, key=lambda stays: cosine[goes, stays])].append(goes)
  return found


def _average(layer: dict[str, np.ndarray], stays: int, joined: list[int], rows_E, align: bool):
  """Writes the average of some experts in the place of the one that stays."""
  if not joined: return
  shares = np.maximum(np.asarray([rows_E[stays], *(rows_E[goes] for goes in joined)], np.float64), 1e-9)
  shares /= shares.sum()
  orders = [order(layer, stays, goes) if align else np.arange(layer['up'].shape[-1]) for goes in joined]
  for name, array in layer.items():
    units = lambda e, order: array[e][order] if name == 'down' else array[e][:, order]
    total = shares[0] * array[stays] + sum(share * units(goes, one) for share, goes, one in zip(shares[1:], joined, orders))
    array[stays] = total.astype(array.dtype)


def order(layer: dict[str, np.ndarray], stays: int, goes: int) -> np.ndarray:
  """Of the hidden units of one expert, so that each lies where the unit of the other is whose weights are most like its
  own: the assignment with the largest sum of products (Ainsworth et al. 2023, arXiv 2209.04836, eq. 2)."""
  from scipy.optimize import linear_sum_assignment
  products = sum(one(layer[name], stays).T @ one(layer[name], goes)
                 for name, one in (('gate', _columns), ('up', _columns), ('down', _rows)))
  return linear_sum_assignment(products, maximize=True)[1]


def _columns(array, e: int): return array[e].astype(np.float32)


def _rows(array, e: int): return array[e].T.astype(np.float32)
