"""A rotated model computes the same, in every space and block; what is in few bits anywhere is refused."""
import jax
import numpy as np
import pytest

from efficient_lm import tree
from efficient_lm.compression import rotation
from efficient_lm.errors import IncompatibleError
from efficient_lm.formats import Int
from efficient_lm.models.layers import RMSNorm
from efficient_lm.weights.biased import unbiased
from efficient_lm.weights.fake_quantized import FakeQuantized
from efficient_lm.weights.low_precision import low_precision
from efficient_lm.weights.quantized import round_to_nearest
from efficient_lm.weights.quantizers import Rounding
from efficient_lm.weights.rotated import Rotated
from efficient_lm.weights.weight import Weight
from tests.compressing import assert_the_same, family, masked_once, model_of

pytestmark = pytest.mark.usefixtures('quick_compilation')

MODELS = [('grouped', 'dense', False), ('grouped', 'experts', False), ('latent', 'dense', True)]
SPACES = {'residual': dict(residual=4096, values=1, hidden=1), 'values': dict(residual=1, values=4096, hidden=1),
          'hidden': dict(residual=1, values=1, hidden=4096), 'blocks': dict(residual=8, values=4, hidden=2)}


def rotated(model, **sizes):
  return rotation.rotated(model, jax.random.key(0), **sizes)


@pytest.mark.thinned
@pytest.mark.parametrize('described', MODELS, ids=str)
@pytest.mark.parametrize('space', SPACES)
def test_it_computes_the_same_and_other_weights_do(described, space):
  model = model_of(*described)
  changed = rotated(model, **SPACES[space])
  assert_the_same(model, changed)
  after = dict(tree.select(changed, Weight))
  names = {path.split('/')[-1] for path, weight in tree.select(model, Weight)
           if not np.allclose(innermost_array(weight), innermost_array(after[path]))}
  if space == 'values': assert names <= {'value', 'value_up', 'output'} and names
  if space == 'hidden': assert names == {'down'}
  if space in ('residual', 'blocks'): assert {'embed', 'output', 'down'} <= names


@pytest.mark.parametrize('name, space', [('shared', 'blocks'), ('plain', 'values'), ('plain', 'hidden')])
def test_biases_positions_and_norms_of_other_kinds_turn_along_or_stay(name, space):
  assert_the_same(family(name), changed := rotated(family(name), **SPACES[space]))
  assert any(isinstance(innermost, Rotated) for _, weight in tree.select(changed, Weight)
             for innermost in (weight, unbiased(weight))) == (space != 'values')


@pytest.mark.parametrize('name, why', [('plain', 'norm subtracts the mean'), ('pattern', 'has norms behind its branches'),
                                       ('behind', 'has norms behind its branches')])
def test_a_stream_whose_norms_do_not_commute_with_rotations_is_refused(name, why):
  with pytest.raises(IncompatibleError, match=why): rotated(family(name), **SPACES['residual'])


def innermost_array(weight):
  return (weight.inner if isinstance(weight, Rotated) else weight).materialize()


def test_norms_of_the_residual_stream_lose_their_scales_and_others_keep_them():
  changed = dict(tree.select(rotated(model_of('latent'), **SPACES['residual']), RMSNorm))
  for path, norm in changed.items():
    inside = path.split('/')[-1] in ('query_norm', 'latent_norm')
    assert np.all(np.asarray(norm.scale.get_value()) == 1) != inside, path


def test_one_large_channel_is_spread():
  """What a rotation is for: the model has channels that are eight times as large."""
  peak = lambda model: np.abs(model.embed.materialize()).max() / np.abs(model.embed.materialize()).std()
  assert peak(rotated(model_of(), **SPACES['residual'])) < 0.6 * peak(model_of())


def test_blocks_are_the_largest_powers_of_two_that_divide():
  found = rotation.blocks(model_of(), residual=4096, values=4096, hidden=4096)
  assert found == {'residual stream': {32}, 'values': {8}, 'hidden units': {8}}   # of 32, 8 and 40
  assert rotation.blocks(model_of(), residual=4, values=2, hidden=1) == {
    'residual stream': {4}, 'values': {2}, 'hidden units': {1}}


LOWER = dict(forward='int8', dgrad='int8', wgrad='int8')
IN_FEW_BITS = {
  'stored': (lambda weight: round_to_nearest(weight, Int(bits=4)), 'is stored as int4'),
  'QAT': (lambda weight: FakeQuantized(weight, Rounding(Int())), 'is trained as float32, fake-quantized to int8'),
  'QAT in low precision': (
    lambda weight: low_precision(FakeQuantized(weight, Rounding(Int())), LOWER), 'is trained as float32, fake-quantized'),
}


@pytest.mark.parametrize('where', ['^embed$', '^own_head$', 'mlp/up$', 'attention/query$'])
@pytest.mark.parametrize('kind', IN_FEW_BITS)
def test_a_weight_in_few_bits_is_refused_by_name_embedding_and_head_included(kind, where):
  wrap, message = IN_FEW_BITS[kind]
  model = tree.rewrite(model_of(), Weight, lambda _, weight: wrap(weight), where)
  path = next(path for path, _ in tree.select(model, Weight, where))
  with pytest.raises(IncompatibleError, match=f'^{path} {message}'): rotated(model, **SPACES['values'])


def test_products_in_low_precision_were_for_training_and_masks_are_gone():
  """Where inputs or outputs are mixed no zero stays one; the loop over stages says so (`runs.invariants`)."""
  lowered = tree.rewrite(model_of(), Weight, lambda _, weight: low_precision(weight, LOWER), 'mlp/')
  assert_the_same(model_of(), rotated(lowered, **SPACES['residual']))
  pruned = tree.rewrite(model_of(), Weight, lambda _, weight: masked_once(weight, 0.5), 'mlp/up$')
  changed = rotated(pruned, **SPACES['residual'])
  assert_the_same(pruned, changed)
  assert np.mean(np.asarray(dict(tree.select(changed, Weight))['stacks/0/blocks/mlp/up'].materialize()) == 0) < 0.01
