"""SmoothQuant changes no output, and evens out the channels of activations."""
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_lm import tree
from efficient_lm.compression import calibration
from efficient_lm.formats import Int
from efficient_lm.techniques.quantization.smooth_quant import SmoothQuant
from efficient_lm.weights.fake_quantized import FakeQuantized
from efficient_lm.weights.quantizers import Rounding
from efficient_lm.weights.weight import Weight
from tests.compressing import Context, abstractly, assert_structure, assert_the_same, batch_of, logits_of, model_of

pytestmark = pytest.mark.usefixtures('quick_compilation')

PATHS = [f'stacks/0/blocks/{path}' for path in ('attention/query', 'attention/output', 'mlp/down')]


@pytest.mark.parametrize('kinds', [{}, {'mlp': 'experts'}, {'attention': 'latent'}], ids=str)
def test_a_smoothed_model_computes_the_same(kinds):
  model, stage = model_of(**kinds), SmoothQuant(sequences=8)
  smooth, (note,) = stage(model, Context())
  assert_the_same(model, smooth)
  assert_structure(abstractly(stage, model), smooth)
  assert note.startswith('SmoothQuant: the largest channel')


def peaks(model):
  found = calibration.statistics(model, [batch_of()], {path: ('peak',) for path in PATHS})
  return {path: np.asarray(one['peak']) for path, one in found.items()}


def test_with_alpha_one_all_channels_have_the_same_peak():
  """Heads that share values share their scales: there the largest of the group is 1."""
  smooth, _ = SmoothQuant(alpha=1.0, sequences=8)(model_of(), Context())
  for path, peak in peaks(smooth).items():
    if 'output' in path: peak = peak.reshape(2, 2, 2, 8).max(2)
    np.testing.assert_allclose(peak, 1, rtol=1e-3, err_msg=path)


def test_where_names_the_producers():
  model = model_of()
  smooth, _ = SmoothQuant(where=r'norm$', sequences=8)(model, Context())
  before, after = peaks(model), peaks(smooth)
  assert not np.allclose(before[PATHS[0]], after[PATHS[0]], rtol=1e-2)
  np.testing.assert_allclose(before[PATHS[2]], after[PATHS[2]], rtol=1e-3)
  with pytest.raises(ValueError, match="no producer of channels matches 'nrom'"): SmoothQuant(where='nrom')(model, Context())


def test_tokens_in_few_bits_come_out_closer():
  """The embedding has channels that are eight times larger than all others."""
  def error(model):
    rounded = lambda _, weight: FakeQuantized(weight, Rounding(Int()), Rounding(Int(bits=4)))
    return float(jnp.mean(jnp.square(logits_of(tree.rewrite(model, Weight, rounded, 'blocks')) - logits_of(model_of()))))
  assert error(SmoothQuant(sequences=8)(model_of(), Context())[0]) < 0.8 * error(model_of())


def test_statistics_need_the_memory_of_one_layer_however_many_there_are(monkeypatch):
  """Of every program that calibration runs: a deep model's take no more than those of a shallow one."""
  def largest(num_layers):
    found, calls = [], []

    def measured(*arguments):
      found.append(calibrated.lower(*arguments).compile().memory_analysis().temp_size_in_bytes)
      calls.append(1)
      return calibrated(*arguments)
    with monkeypatch.context() as patch:
      patch.setattr(calibration, '_of_layer', measured)
      SmoothQuant(sequences=8)(model_of(num_layers=num_layers), Context())
    assert len(calls) == num_layers, 'each layer is observed by itself, on one batch'
    return max(found)
  calibrated = calibration._of_layer
  assert 0 < largest(6) <= largest(2)


def test_a_wrong_field_is_named():
  assert [name for name, _, _ in SmoothQuant(alpha=2., where='(', sequences=0).check()] == ['where', 'alpha', 'sequences']
