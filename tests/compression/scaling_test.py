"""Channels are scaled where they come from and where they are read, so the model computes the same; zeros stay zeros."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_lm import tree
from efficient_lm.compression import calibration, hessian, scaling
from efficient_lm.compression.coupling import couplings
from efficient_lm.formats import Group, Int, MidRise
from efficient_lm.models.transformer import Block
from efficient_lm.weights.weight import Weight
from tests.compressing import assert_the_same, batch_of, masked_once, model_of
from tests.formats.every import FORMATS, NAMES

pytestmark = pytest.mark.usefixtures('quick_compilation')

MODELS = [('grouped', 'dense'), ('grouped', 'experts'), ('latent', 'dense')]
FORMAT = Int(bits=3, scales=Group(size=8))


@functools.cache
def pruned(attention, mlp):
  """Half of `up` and `down` is zero."""
  half = lambda _, weight: masked_once(weight, 0.5)
  return tree.rewrite(model_of(attention, mlp), Weight, half, '/(up|down)$')


@functools.cache
def peaks_of(attention, mlp):
  model = pruned(attention, mlp)
  wanted = {path: ('peak',) for path, _ in tree.select(model, Weight, 'stacks/')}
  return calibration.statistics(model, [batch_of()], wanted)


def zeros_of(model):
  return {path: [one for one in weight.invariants() if one.kind == 'zeros'] for path, weight in tree.select(model, Weight)}


@pytest.mark.thinned
@pytest.mark.parametrize('described', MODELS, ids=str)
@pytest.mark.parametrize('alpha', [0., 0.5, 1.])
def test_smoothing_changes_no_output_and_no_zero(described, alpha):
  model = pruned(*described)
  changed = jax.jit(lambda model, peaks: scaling.smooth_quant(model, peaks, alpha, couplings))(model, peaks_of(*described))
  assert_the_same(model, changed)
  weights = dict(tree.select(changed, Weight))
  for path, promised in zeros_of(model).items():
    assert all(one.held_by(weights[path]) and weights[path].invariants() for one in promised), path


def test_with_alpha_one_all_channels_of_activations_come_out_equally_large():
  model = model_of()
  norms = lambda layer: [one for one in couplings(layer) if one.producer.endswith('norm')]
  wanted = {f'stacks/0/blocks/{path}': ('peak',) for path in ('attention/query', 'mlp/gate')}
  before = calibration.statistics(model, [batch_of()], wanted)
  after = calibration.statistics(scaling.smooth_quant(model, before, 1., norms), [batch_of()], wanted)
  for path in wanted:
    assert np.asarray(before[path]['peak']).max() > 2
    np.testing.assert_allclose(after[path]['peak'], 1, rtol=1e-4, err_msg=path)


def layer_of(model):
  return jax.tree.map(lambda leaf: leaf[0], dict(tree.select(model, Block))['stacks/0/blocks'])


@pytest.mark.parametrize('described', MODELS, ids=str)
def test_awq_prepares_a_layer_that_computes_the_same_with_the_same_zeros(described):
  model = pruned(*described)
  layer, hidden = layer_of(model), [calibration.embedded(model, batch_of())]
  first = calibration.sharing(layer)
  paths = [path for path, _ in tree.select(layer, Weight) if not path.endswith('router')]
  seen = calibration.layer_statistics(layer, hidden, {first[path]: ('gram', 'magnitude', 'count') for path in paths})
  changed, found = scaling.awq_prepared(layer, {path: seen[first[path]] for path in paths}, dict.fromkeys(paths, FORMAT), 4)
  before, after = (calibration.advance(one, hidden)[0].x_BTD for one in (layer, changed))
  np.testing.assert_allclose(before, after, atol=2e-4 * np.abs(before).max())   # float32 sums, in other orders
  weights = dict(tree.select(changed, Weight))
  for path, promised in zeros_of(layer).items(): assert all(one.held_by(weights[path]) for one in promised), path
  measured = calibration.layer_statistics(changed, hidden, {path: ('gram',) for path in paths})
  for path in paths:
    wanted = measured[path]['gram']
    np.testing.assert_allclose(found[path]['gram'], wanted, rtol=1e-2, atol=1e-3 * np.abs(wanted).max(), err_msg=path)


@pytest.mark.thinned
@pytest.mark.parametrize('format', [one for one in FORMATS if one != MidRise(bits=3)],
                         ids=[name for name in NAMES if name != MidRise(bits=3).name])
def test_clipping_raises_the_error_of_no_tile(format):
  """Each tile by itself, as if its outputs met no others: that is what it minimises. And what is zero stays zero."""
  rng = np.random.default_rng(0)
  x_MI, keep_OI = rng.normal(size=(200, 64)), rng.random((16, 64)) < 0.7
  w_OI = jnp.asarray(rng.standard_t(3, (16, 64)) * keep_OI, jnp.float32)
  gram_II = jnp.asarray(x_MI.T @ x_MI, jnp.float32)
  plain, clipped = (np.asarray(format.rounded(w_OI, format.scales_for(w_OI, range)))
                    for range in (None, scaling.Clipped(gram_II, 8, 0.5)))
  if format.has_zero: assert not clipped[~keep_OI].any()
  q = format.scales.counts(16, 64)[1]
  tiles = lambda change: [float(jnp.sum(hessian.output_error(change[:, i * 64 // q:(i + 1) * 64 // q], gram_II[
    i * 64 // q:(i + 1) * 64 // q, i * 64 // q:(i + 1) * 64 // q]))) for i in range(q)]
  # The error of the format's own range is among those compared, up to the order of its sums.
  for got, wanted in zip(tiles(clipped - w_OI), tiles(plain - w_OI), strict=True): assert got <= wanted * (1 + 1e-4)
