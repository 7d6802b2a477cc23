"""Which weight gets which format: rules in order, the first whose pattern is found in a weight's path decides.

A rule that decides nothing is an error: it is misspelt, or another stands in front of it. What no rule names stays float,
and large weights among them are named in the note that every rewriting leaves (`rewriting.describe`).
"""
import dataclasses
import re
from typing import Any

# The matrices of the layers: attention's, feed-forward's, experts'. Not the router, which decides more than it costs.
LAYERS = r'stacks/.*/(query|key|value|output|latent|gate|up|down)\w*$'


@dataclasses.dataclass(kw_only=True)
class Rule:
  """`weights` and `activations` of the products of weights whose path matches `where`: formats of `efficient_lm.formats`, or
  None for floats. Both None keeps a weight as it is, from rules that follow. Activations are quantized token by token."""
  where: str = LAYERS
  weights: Any = None
  activations: Any = None

  def check(self): yield from check_pattern(self, 'where')

  @property
  def keeps(self) -> bool: return self.weights is None and self.activations is None


def check_rules(rules):
  """Problems of a tuple of rules, for the class whose field `rules` they are."""
  if not rules: yield 'rules', rules, 'must hold at least one Rule(…)'


def check_pattern(config, field: str):
  """The problem of a field that is no regular expression."""
  try: re.compile(getattr(config, field))
  except re.error as error: yield field, getattr(config, field), f'must be a regular expression: {error}'
