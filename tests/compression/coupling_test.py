"""Any channel may be divided where it comes from and multiplied where it is read: the model computes the same."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_lm import tree
from efficient_lm.compression import coupling
from efficient_lm.formats import Int
from efficient_lm.models.transformer import Block
from efficient_lm.weights.quantized import round_to_nearest
from efficient_lm.weights.rotated import Rotated
from efficient_lm.weights.weight import Dense, Weight
from tests.compressing import FAMILIES, assert_the_same, family, model_of

KINDS = [('grouped', 'dense'), ('grouped', 'experts'), ('latent', 'dense')]


def layer_of(attention='grouped', mlp='dense'):
  return dict(tree.select(model_of(attention, mlp), Block))['stacks/0/blocks']


def channels(layer, one):
  """Shape of a scale for each channel of a producer, layers (and experts) in front."""
  producer = dict(tree.select(layer, (Weight, *coupling.NORMS)))[one.producer]
  return producer.scale.shape if isinstance(producer, coupling.NORMS) else coupling.matrix_of(producer).shape[:-1]


@pytest.mark.parametrize('kind', [*KINDS, *FAMILIES], ids=str)
def test_dividing_any_producer_by_any_scale_changes_no_output(kind):
  """Biases are divided with what they are added to."""
  model = family(kind) if isinstance(kind, str) else model_of(*kind)

  @jax.jit
  def folded(model):
    rng = np.random.default_rng(0)
    def change(_, layer):
      for one in filter(lambda one: one.producer, coupling.couplings(layer)):
        layer = coupling.divided(layer, one, jnp.asarray(np.exp(rng.normal(size=channels(layer, one))), jnp.float32))
      return layer
    return tree.rewrite(model, Block, change)
  changed = folded(model)
  assert_the_same(model, changed)
  # What reads a stream without a norm, or an activation.
  without = ('embed', 'own_head', 'positions', *{'behind': ('query', 'key', 'gate'), 'plain': ('down',)}.get(kind, ()))
  for (path, a), (_, b) in zip(tree.select(model, Weight), tree.select(changed, Weight), strict=True):
    assert path.endswith(without) or not np.allclose(a.materialize(), b.materialize()), f'{path} takes part'


@pytest.mark.parametrize('kind', [*KINDS, *FAMILIES], ids=str)
def test_all_weights_of_a_layer_consume_something_and_all_consumers_are_there(kind):
  for _, layer in tree.select(family(kind) if isinstance(kind, str) else model_of(*kind), Block):
    read = [path for one in coupling.couplings(layer) for path in one.consumers]
    assert len(read) == len(set(read)) and set(read) == {path for path, _ in tree.select(layer, Weight)}


def test_only_what_has_a_producer_can_be_folded():
  """Nothing before a norm that stands behind its branch, nor an activation without a gate, can be divided."""
  foldable = lambda name: {one.consumers[0].split('/')[-1] for _, layer in tree.select(family(name), Block)
                           for one in coupling.couplings(layer) if coupling.foldable(layer, one)}
  assert foldable('behind') == {'output', 'down'}
  assert foldable('plain') == {'query', 'output', 'up'}


def test_a_head_of_values_is_read_by_as_many_heads_as_share_it():
  one = coupling.Coupling('value', ('output',), head=2, repeats=3)
  s_K = one.to_inputs(jnp.array([1., 2., 3., 4.]))
  assert s_K.tolist() == [1, 2, 1, 2, 1, 2, 3, 4, 3, 4, 3, 4]
  assert one.to_channels(s_K + jnp.arange(12), jnp.max).tolist() == [5, 7, 13, 15]
  found = {one.producer: one for one in coupling.couplings(layer_of())}
  assert (found['attention/value'].head, found['attention/value'].repeats) == (8, 2)
  assert set(coupling.writers(layer_of(mlp='experts'))) == {'attention/output', 'mlp/experts/down', 'mlp/shared/down'}


def test_layers_of_unknown_kinds_have_no_couplings():
  layer = jax.tree.map(lambda leaf: leaf, layer_of())
  layer.attention, layer.mlp = Dense(jnp.ones((2, 2)), 'DF', 'D'), Dense(jnp.ones((2, 2)), 'DF', 'D')
  assert coupling.couplings(layer) == []


def test_channels_that_are_rotated_on_the_way_are_left_alone():
  layer = layer_of()
  one = coupling.couplings(layer)[-1]
  assert one.consumers == ('mlp/down',) and coupling.foldable(layer, one)
  assert not coupling.foldable(coupling.updated(layer, {'mlp/down': Rotated(layer.mlp.down, 8)}), one)


def test_weights_in_few_bits_take_up_no_scales():
  layer = layer_of()
  rounded = coupling.updated(layer, {'mlp/up': round_to_nearest(layer.mlp.up, Int())})
  assert [coupling.foldable(rounded, one) for one in coupling.couplings(rounded)] == [True, True, False, False]
  with pytest.raises(ValueError, match='is stored as int8 per channel already'):
    coupling.divided(rounded, coupling.couplings(rounded)[2], jnp.ones((2, 32)))


def test_a_weight_and_its_matrix_are_one():
  for _, weight in tree.select(layer_of('latent', 'experts'), Weight):
    again = coupling.with_matrix(weight, coupling.matrix_of(weight))
    np.testing.assert_array_equal(again.materialize(), weight.materialize())
    assert coupling.matrix_shape(weight) == coupling.matrix_of(weight).shape[-2:]
