"""Experts that are the same but for the order of their hidden units are joined without loss."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_lm.compression import merged_experts
from efficient_lm.compression.dimensions import Removal, spaces
from efficient_lm.compression.merging import MergeExperts
from efficient_lm.errors import IncompatibleError
from efficient_lm.models import spec
from efficient_lm.models.moe import routing
from efficient_lm.models.moe.layer import MoE
from efficient_lm.techniques.pruning.prune_once import PruneOnce
from efficient_lm.tree import rewrite
from tests.compressing import ATTENTIONS, Context, D, V, assert_the_same, batch_of, drawn, logits_of

pytestmark = pytest.mark.usefixtures('quick_compilation')


def twins():
  """Four experts, of which the last two are the first ones with their units in another order; a token visits one."""
  mlp = spec.MoE(num_experts=4, hidden=12, router=routing.SoftmaxTopK(top_k=1))
  stack = spec.Stack(num_layers=2, attention=ATTENTIONS['grouped'], mlp=mlp)
  model, rng = drawn(spec.Transformer(vocab_size=V, dim=D, stacks=(stack,))), np.random.default_rng(1)
  places = np.stack([rng.permutation(12) for _ in range(2)])

  def change(_, mixture):
    mixture = jax.tree.map(lambda leaf: leaf, mixture)
    router = mixture.router.materialize()
    # A twin is chosen where both logits are negative.
    mixture.router = mixture.router.replaced(router.at[..., 2:].set(router[..., :2] * 0.9))
    for name, axis in (('gate', -1), ('up', -1), ('down', -2)):
      array = getattr(mixture.experts, name).materialize()
      copies = jnp.stack([jnp.take(array[:, e], places[e], axis=axis) for e in range(2)], 1)
      setattr(mixture.experts, name, getattr(mixture.experts, name).replaced(array.at[:, 2:].set(copies)))
    return mixture
  return rewrite(model, MoE, change)


def kept_of(model, index):
  space = next(space for space in spaces(model) if space.kind == 'experts')
  return {space: np.broadcast_to(np.array(index, np.int32), (*space.lead, len(index)))}


def test_twins_are_joined_without_loss_only_where_their_units_are_brought_in_order():
  model = twins()
  whole, kept = MergeExperts().kept(model, kept_of(model, [0, 1]), [batch_of()])
  for name in ('gate', 'up', 'down'):   # averages of equal numbers
    np.testing.assert_allclose(getattr(whole.stacks[0].blocks.mlp.experts, name).materialize()[:, :2],
                               getattr(model.stacks[0].blocks.mlp.experts, name).materialize()[:, :2], atol=1e-6)
  assert_the_same(Removal(whole, kept)(whole), model)
  loose, _ = MergeExperts(align=False).kept(model, kept, [batch_of()])
  assert not np.allclose(logits_of(Removal(loose, kept)(loose)), logits_of(Removal(model, kept)(model)), atol=1e-2)


def test_experts_are_averaged_by_how_many_tokens_chose_them():
  layer = {name: np.stack([np.full(shape, value) for value in (0., 1., 3.)]) for name, shape in (
    ('gate', (2, 3)), ('up', (2, 3)), ('down', (3, 2)))}
  merged_experts._average(layer, 0, [1, 2], np.array([2., 1., 1.]), align=False)
  for array in layer.values(): np.testing.assert_allclose(array[0], 1.0)


def test_each_goes_to_the_most_alike_of_its_group():
  logits = np.random.default_rng(0).normal(size=(50, 4))
  logits[:, 3] = logits[:, 0] + 0.01
  products = logits.T @ logits
  assert merged_experts.members(products, [0, 2])[0].count(3) == 1
  assert merged_experts.members(products, [0, 2], groups=2)[2] == [3], 'its own group keeps it'


def test_the_order_of_units_is_found():
  rng = np.random.default_rng(0)
  layer, place = {name: rng.normal(size=(2, *shape)) for name, shape in (
    ('gate', (5, 7)), ('up', (5, 7)), ('down', (7, 5)))}, rng.permutation(7)
  for name, array in layer.items(): array[1] = array[0][place] if name == 'down' else array[0][:, place]
  found = merged_experts.order(layer, 0, 1)
  np.testing.assert_array_equal(layer['up'][1][:, found], layer['up'][0])


def test_masked_experts_are_refused():
  pruned, _ = PruneOnce(sparsity=.5, where='experts')(twins(), Context())
  with pytest.raises(IncompatibleError, match='mlp/experts/down is float32, masked: only float experts without masks'):
    MergeExperts().kept(pruned, kept_of(pruned, [0, 1]), [batch_of()])
