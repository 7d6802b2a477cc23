"""Scaled frequencies are those of transformers, and each scaling leaves alone what it should."""
import math

import numpy as np
import pytest

from efficient_lm.models.rope import LinearScaling, Llama3Scaling, Rope, Yarn

LLAMA3 = Llama3Scaling(factor=8., low_freq_factor=1., high_freq_factor=4., original_length=8192)
DEEPSEEK = Yarn(factor=40., original_length=4096, mscale=1., mscale_all_dim=.5)
# From transformers 5.24.0, torch 2.13.0: ROPE_INIT_FUNCTIONS[rope_type](LlamaConfig(head_dim=16, rope_parameters=…), 'cpu').
FOUND = {
  'linear': (LinearScaling(factor=8.), 1e6, 1.0, [
    0.125, 0.0222284924, 0.00395284733, 0.000702926656, 0.000125000006, 2.22284925e-05, 3.95284678e-06, 7.02926684e-07]),
  'llama3': (LLAMA3, 5e5, 1.0, [
    1.0, 0.193922758, 0.0376060307, 0.00729266508, 0.000524846022, 3.42810235e-05, 6.64786967e-06, 1.28917316e-06]),
  'yarn': (Yarn(factor=4., original_length=64), 1e4, 1.138629436111989, [
    1.0, 0.237170815, 0.049999997, 0.00790569466, 0.00249999994, 0.000790569466, 0.000250000012, 7.90569466e-05]),
  'yarn, not truncated': (Yarn(factor=4., original_length=64, truncate=False), 1e4, 1.138629436111989, [
    1.0, 0.198583528, 0.0255952496, 0.00790569466, 0.00249999994, 0.000790569466, 0.000250000012, 7.90569466e-05]),
  'yarn of DeepSeek': (DEEPSEEK, 1e4, 1.1557219901962608, [
    1.0, 0.316227764, 0.100000001, 0.0239147246, 0.00512499968, 0.000849862176, 2.49999994e-05, 7.90569447e-06]),
}


@pytest.mark.parametrize('name', FOUND)
def test_frequencies_and_magnitude_are_those_of_transformers(name):
  scaling, theta, magnitude, expected = FOUND[name]
  found = scaling.frequencies(16, theta)
  assert found.dtype == np.float32
  # A power and a few products of float32, each rounded once: some units of 2^-24.
  np.testing.assert_allclose(found, expected, rtol=1e-6)
  assert scaling.magnitude == pytest.approx(magnitude, rel=1e-12)


@pytest.mark.parametrize('scaling', [LinearScaling(factor=1.), Yarn(factor=1., original_length=64),
  Llama3Scaling(factor=1., low_freq_factor=1., high_freq_factor=4., original_length=64)], ids=str)
def test_a_factor_of_one_scales_nothing(scaling):
  np.testing.assert_allclose(scaling.frequencies(16, 1e4), 1e4 ** (-np.arange(8) / 8), rtol=1e-6)
  assert scaling.magnitude == scaling.softmax == 1


@pytest.mark.parametrize('scaling', [LLAMA3, Yarn(factor=8., original_length=8192)], ids=['llama3', 'yarn'])
def test_fast_dimensions_stay_and_slow_ones_are_interpolated(scaling):
  plain = LinearScaling(factor=1.).frequencies(128, 5e5)
  share = plain / scaling.frequencies(128, 5e5)
  np.testing.assert_allclose([share[0], share[-1]], [1, 8], rtol=1e-6)
  assert np.all(np.diff(share) > -1e-5) and np.any((share > 1.5) & (share < 7)), 'and a ramp lies between them'


def test_only_deepseeks_yarn_changes_the_scale_of_scores():
  assert DEEPSEEK.softmax == pytest.approx((0.05 * math.log(40) + 1) ** 2)
  assert Yarn(factor=40., original_length=4096).softmax == LLAMA3.softmax == 1


@pytest.mark.parametrize('wrong, field', [
  (LinearScaling(factor=.5), 'factor'), (Yarn(factor=float('nan'), original_length=8), 'factor'),
  (Yarn(factor=2., original_length=0), 'original_length'), (Yarn(factor=2., original_length=8, beta_fast=1.), 'beta_fast'),
  (Yarn(factor=2., original_length=8, beta_slow=0.), 'beta_slow'),
  (Yarn(factor=2., original_length=8, attention_factor=0.), 'attention_factor'),
  (Llama3Scaling(factor=2., low_freq_factor=4., high_freq_factor=4., original_length=8), 'high_freq_factor'),
  (Llama3Scaling(factor=2., low_freq_factor=0., high_freq_factor=4., original_length=8), 'low_freq_factor'),
  (Rope(theta=1., scaling=Yarn(factor=2., original_length=8)), 'theta')], ids=str)
def test_a_wrong_field_is_named(wrong, field):
  assert [name for name, _, fix in wrong.check() if fix.startswith('must be')] == [field]
  assert not list(LLAMA3.check()) + list(DEEPSEEK.check())
