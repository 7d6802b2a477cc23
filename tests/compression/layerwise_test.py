"""Post-training quantization layer by layer: pruned entries stay zero in every format, and the account is true."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_lm.compression import calibration, layerwise, rewriting, scaling, solver
from efficient_lm.compression.method import RoundToNearest
from efficient_lm.compression.rules import Rule
from efficient_lm.errors import IncompatibleError
from efficient_lm.formats import Group, Int, MeanSquaredError
from efficient_lm.techniques import Gptq
from efficient_lm.techniques.pruning.prune_once import NofM
from efficient_lm.tree import select
from efficient_lm.weights.fake_quantized import FakeQuantized
from efficient_lm.weights.low_precision import low_precision
from efficient_lm.weights.quantized import Quantized
from efficient_lm.weights.quantizers import Rounding
from efficient_lm.weights.rotated import Rotated
from efficient_lm.weights.weight import Dense, Weight
from tests.compressing import B, T, batch_of, masked_once, model_of
from tests.formats.every import FORMATS, NAMES

pytestmark = pytest.mark.usefixtures('quick_compilation')

INT4 = Rule(weights=Int(bits=4, scales=Group(size=8)))


def draw(*shape, seed=0):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def gram(lead=()):
  x_MI = draw(100, 64, seed=2)
  return jnp.broadcast_to(x_MI.T @ x_MI, (*lead, 64, 64))


def clipped(w_OI):
  return scaling.Clipped(gram(w_OI.shape[:-2]), 4, .5)


ENCODINGS = {
  'rtn': lambda format, w_OI, keep_OI: format.encode(w_OI, format.scales_for(w_OI)),
  'least squares': lambda format, w_OI, keep_OI: format.encode(w_OI, format.scales_for(w_OI, MeanSquaredError())),
  'gptq': lambda format, w_OI, keep_OI: solver.gptq(w_OI, gram(w_OI.shape[:-2]), format, keep_OI=keep_OI),
  'awq': lambda format, w_OI, keep_OI: format.encode(w_OI, format.scales_for(w_OI, clipped(w_OI))),
}
MASKED = {
  'half': lambda: masked_once(Dense(draw(64, 16), 'DF', 'D'), 0.5),
  '2:4 of experts': lambda: masked_once(Dense(draw(2, 64, 16), 'EFD', 'F'), pattern=NofM(n=2, m=4)),
  'low precision': lambda: low_precision(
    masked_once(Dense(draw(2, 32, 16), 'NHD', 'NH'), 0.5), {'forward': 'int8'}),
}


@pytest.mark.thinned
@pytest.mark.parametrize('encoding, kind', [
  *((name, 'half') for name in ENCODINGS), ('rtn', '2:4 of experts'), ('rtn', 'low precision')])
@pytest.mark.parametrize('format', FORMATS, ids=NAMES)
def test_what_was_pruned_is_zero_in_every_format_by_every_method(format, encoding, kind):
  """A format without a zero has the mask around what is stored."""
  weight = MASKED[kind]()
  stored = layerwise.stored(weight, Rule(weights=format), functools.partial(ENCODINGS[encoding], format))
  assert isinstance(stored, Quantized) == format.has_zero
  assert all(one.held_by(stored) for one in weight.invariants())
  promised = {one.kind for one in stored.invariants()}
  assert {'bits', 'zeros'} <= promised and all(one.held_by(stored) for one in stored.invariants())


def test_what_a_rotation_holds_is_stored_and_activations_alone_are_fake_quantized():
  encode = functools.partial(ENCODINGS['rtn'], INT4.weights)
  rotated = layerwise.stored(Rotated(Dense(draw(64, 16), 'FD', 'F'), 8), INT4, encode)
  assert isinstance(rotated, Rotated) and isinstance(rotated.inner, Quantized)
  activations = layerwise.stored(Dense(draw(64, 16), 'FD', 'F'), Rule(activations=Int()), encode)
  assert isinstance(activations, FakeQuantized) and activations.weights is None


@pytest.mark.parametrize('wrap', [lambda weight: weight, lambda weight: low_precision(weight, {'forward': 'int8'}),
                                  lambda weight: Rotated(weight, 8)], ids=['itself', 'low precision', 'rotated'])
def test_what_is_quantized_already_is_refused_wherever_it_is_nested(wrap):
  weight = wrap(FakeQuantized(Dense(draw(64, 16), 'FD', 'F'), Rounding(Int(bits=4))))
  with pytest.raises(IncompatibleError, match='is trained as float32, fake-quantized to int4'):
    layerwise.nearest('', weight, INT4, RoundToNearest())


def quantized(method, least=1, mlp='dense', where=''):
  model = model_of(mlp=mlp)
  decided = rewriting.assign(model, (Rule(where=where or INT4.where, weights=INT4.weights),))
  layers = layerwise.Layers(method, decided, least)
  return calibration.layer_by_layer(model, [batch_of()], layers), layers


def test_the_account_says_what_was_done_on_how_many_tokens_and_what_it_was_good_for():
  model, layers = quantized(Gptq(block=8))
  assert layers.done == {path for path, weight in select(model, Weight) if isinstance(weight, Quantized)}
  assert {path.split('/')[-1] for path in layers.done} == {'query', 'key', 'value', 'output', 'gate', 'up', 'down'}
  assert all(np.all(np.stack(counts) == B * T) for counts in layers.counts.values())
  note, = layers.notes(B * T)
  assert note.startswith(f'calibrated on {B * T} tokens: output error 0.')
  assert all(float(gain) < 1 for gains in layers.gains.values() for gain in gains), 'GPTQ errs less than RTN'


def test_a_matrix_that_saw_too_few_tokens_is_left_to_round_to_nearest_and_named():
  few, layers = quantized(Gptq(block=8), least=10 ** 6, mlp='experts')
  nearest, _ = quantized(RoundToNearest(), mlp='experts')
  for (path, a), (_, b) in zip(select(few, Quantized), select(nearest, Quantized), strict=True):
    np.testing.assert_array_equal(a.materialize(), b.materialize(), err_msg=path)
  assert any('RTN, for want of 1000000, of those of layer.expert 0.0' in note for note in layers.of_experts())
  counted = next(counts for path, counts in layers.counts.items() if path.endswith('experts/up'))
  assert np.stack(counted).sum() == 2 * 2 * B * T, 'two experts a token, in two layers'


def test_every_layer_is_calibrated_on_what_quantized_layers_put_out():
  """With the last layer float, its inputs are those of the model as it is quantized."""
  model, _ = quantized(Gptq(block=8))
  hidden = [calibration.embedded(model, batch_of())]
  for i in range(2): hidden = calibration.advance(jax.tree.map(lambda leaf, i=i: leaf[i], model.stacks[0].blocks), hidden)
  seen = []

  def change(prefix, layer, given):
    layer, after = layerwise.Layers(Gptq(block=8), rewriting.assign(model_of(), (INT4,)), 1)(prefix, layer, given)
    seen.append(after[0].x_BTD)
    return layer, after
  calibration.layer_by_layer(model_of(), [batch_of()], change)
  np.testing.assert_allclose(seen[-1], hidden[0].x_BTD, atol=1e-4 * np.abs(seen[-1]).max())
