"""A rule says which weights, and keeps them where it has no format; wrong patterns are named."""
import re

import pytest

from efficient_lm.compression import rules
from efficient_lm.compression.rules import LAYERS, Rule
from efficient_lm.formats import Int


def test_wrong_settings_are_named():
  assert [field for field, _, _ in Rule(where='(').check()] == ['where']
  assert [field for field, _, _ in rules.check_rules(())] == ['rules']


@pytest.mark.parametrize('rule, keeps', [(Rule(), True), (Rule(weights=Int()), False), (Rule(activations=Int()), False)])
def test_a_rule_without_formats_keeps_what_it_matches(rule, keeps):
  assert rule.keeps == keeps and not list(rule.check())


def test_the_default_is_every_matrix_of_the_layers_and_no_other():
  """Not the router, embedding or head, nor a norm; in a stack or unrolled, of experts too."""
  for path in ('stacks/0/blocks/attention/query', 'stacks/1/blocks/3/mlp/down', 'stacks/0/blocks/mlp/experts/gate',
               'stacks/0/blocks/attention/latent_down', 'stacks/0/blocks/mlp/shared/up'):
    assert re.search(LAYERS, path), path
  for path in ('embed', 'own_head', 'stacks/0/blocks/mlp/router', 'stacks/0/blocks/mlp_norm'):
    assert not re.search(LAYERS, path), path
