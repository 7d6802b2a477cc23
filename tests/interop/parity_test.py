"""Figures of two engines, against their definitions."""
import json

import numpy as np

from efficient_lm.interop import parity
from efficient_lm.interop.targets import HuggingFaceFolder

RANDOM = np.random.default_rng(0)
LOGITS_BTV, TOKENS_BT = RANDOM.normal(size=(2, 5, 7)), RANDOM.integers(0, 7, (2, 5))


def test_a_model_beside_itself_differs_in_nothing():
  same = parity.Parity.of(LOGITS_BTV, LOGITS_BTV, TOKENS_BT)
  assert (same.greatest_difference, same.relative_difference, same.kl, same.same_choice) == (0, 0, 0, 1)
  assert same.perplexity_of_model == same.perplexity_of_export and same.tokens == 10


def test_figures_are_their_definitions():
  other = LOGITS_BTV + RANDOM.normal(size=LOGITS_BTV.shape)
  found = parity.Parity.of(LOGITS_BTV, other, TOKENS_BT)
  p, q = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in (LOGITS_BTV, other))
  np.testing.assert_allclose(found.kl, (p * np.log(p / q)).sum(-1).mean(), rtol=1e-12)   # float64 in another order
  chosen = [q[b, t, TOKENS_BT[b, t + 1]] for b in range(2) for t in range(4)]
  np.testing.assert_allclose(found.perplexity_of_export, np.prod(chosen) ** (-1 / 8), rtol=1e-12)
  shifted = parity.Parity.of(LOGITS_BTV, LOGITS_BTV + 3, TOKENS_BT)   # the same distribution
  assert abs(shifted.kl) < 1e-14 and shifted.greatest_difference == 3


class Target(HuggingFaceFolder):
  independent = 'an engine'

  def read(self, out, tokens_BT): raise RuntimeError('first line\nsecond line')


def test_an_engine_that_fails_is_said_and_nothing_is_claimed(tmp_path):
  found, why = parity.measured(Target(), None, str(tmp_path), TOKENS_BT)
  assert found is None and why == 'an engine did not open it (RuntimeError: first line)'
  (tmp_path / 'weights').write_bytes(b'1234')
  said = dict(source='a model', target=Target(), notes=('A note.',), text='')
  parity.write(str(tmp_path), parity=None, why=why, **said)
  page, figures = (tmp_path / 'README.md').read_text(), json.loads((tmp_path / 'parity.json').read_text())
  assert figures['parity'] is None and figures['not_checked'] == why and figures['files'] == {'weights': 4}
  assert why in page and 'perplexity' not in page and '- A note.' in page and '| weights | 4 |' in page
