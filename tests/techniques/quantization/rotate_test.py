"""Rotations change no output, and no channel stands out after them."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_lm import tree
from efficient_lm.compression import calibration
from efficient_lm.compression.coupling import RESIDUAL_NORMS
from efficient_lm.compression.rules import Rule
from efficient_lm.errors import IncompatibleError
from efficient_lm.formats import Int
from efficient_lm.models.layers import RMSNorm
from efficient_lm.models.transformer import Block
from efficient_lm.techniques.quantization.ptq import Quantize
from efficient_lm.techniques.quantization.rotate import Rotate
from efficient_lm.weights.rotated import Rotated
from efficient_lm.weights.weight import Weight
from tests.compressing import Context, abstractly, assert_structure, assert_the_same, batch_of, model_of

pytestmark = pytest.mark.usefixtures('quick_compilation')

MODELS = {'dense': {}, 'tied': {'tied': True}, 'experts': {'mlp': 'experts'}, 'latent': {'attention': 'latent'}}


@pytest.mark.parametrize('name', MODELS)
def test_a_rotated_model_computes_the_same(name):
  model = model_of(**MODELS[name])
  rotated, notes = Rotate()(model, Context())
  assert_the_same(model, rotated)
  assert 'residual stream in blocks of 32' in notes[0] and ('tied' in notes[0]) == (name == 'tied')
  assert_structure(abstractly(Rotate(), model), rotated)


@pytest.mark.parametrize('only', ['residual', 'values', 'hidden'])
def test_each_rotation_by_itself_computes_the_same(only):
  model = model_of()
  rotated, _ = Rotate(**{name: 4096 if name == only else 1 for name in ('residual', 'values', 'hidden')})(model, Context())
  assert_the_same(model, rotated)
  changed = {path for (path, weight), (_, new) in zip(tree.select(model, Weight), tree.select(rotated, Weight))
             if not np.allclose(weight.materialize(), new.materialize(), atol=1e-5)}
  layer = 'stacks/0/blocks/'
  expected = {'values': {'attention/value', 'attention/output'}, 'hidden': set()}
  if only != 'residual': assert changed == {layer + path for path in expected[only]}
  else: assert layer + 'mlp/down' in changed and 'embed' in changed and layer + 'mlp/up' in changed


def test_no_size_of_block_leaves_the_model_itself_in_value():
  model = model_of()
  rotated, _ = Rotate(residual=1, values=1, hidden=1)(model, Context())
  for a, b in zip(jax.tree.leaves(model), jax.tree.leaves(rotated), strict=True): np.testing.assert_array_equal(a, b)


def test_norms_before_the_layers_have_no_scales_left():
  rotated, _ = Rotate()(model_of(), Context())
  block = dict(tree.select(rotated, Block))['stacks/0/blocks']
  norms = dict(tree.select(block, RMSNorm))
  for name in RESIDUAL_NORMS: np.testing.assert_array_equal(norms[name].scale[...], 1)
  assert not np.allclose(norms['attention/query_norm'].scale[...], 1), 'it acts on queries, which are not rotated'


def test_channels_that_stood_out_no_longer_do():
  model = model_of()
  rotated, _ = Rotate()(model, Context())
  wanted = {f'stacks/0/blocks/{path}': ('peak',) for path in ('attention/query', 'mlp/down')}
  before, after = (calibration.statistics(one, [batch_of()], wanted) for one in (model, rotated))
  for path in wanted:
    worst = [float(jnp.max(jnp.max(one[path]['peak'], -1) / jnp.median(one[path]['peak'], -1))) for one in (before, after)]
    # Peaks of 128 tokens in 32 channels that are nearly normal lie within a factor of two of each other.
    assert worst[1] < min(worst[0], 2.5), (path, worst)


def test_down_multiplies_rotated_inputs():
  rotated, _ = Rotate(hidden=4)(model_of(), Context())
  (path, weight), = tree.select(rotated, Rotated)
  assert path == 'stacks/0/blocks/mlp/down' and weight.block == 4


@pytest.mark.parametrize('where, tied', [('embed', False), ('embed', True), ('own_head', False), ('mlp/up', False)])
def test_a_model_in_few_bits_is_refused_whatever_is_quantized_and_whatever_is_rotated(where, tied):
  """A rotated embedding would be floats: the bits that were saved would be lost without a word."""
  stored, _ = Quantize(rules=(Rule(where=where, weights=Int(bits=4)),))(model_of(tied=tied), Context())
  for stage in (Rotate(), Rotate(residual=1)):
    for function in (lambda: stage(stored, Context()), lambda: abstractly(stage, stored)):
      with pytest.raises(IncompatibleError, match=rf'{where} is stored as int4 per channel already'): function()


def test_a_wrong_size_is_named():
  assert [name for name, _, _ in Rotate(residual=3, hidden=0).check()] == ['residual', 'hidden']
  assert not list(Rotate().check())
