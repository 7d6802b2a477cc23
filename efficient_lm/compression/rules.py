"""Which weight gets which format: rules in order, the first whose pattern is found in a weight's path decides.

A rule that decides nothing is an error: it is misspelt, or another stands in front of it. What no rule names stays float,
and large weights among them are named by `describe`, which every rewriting prints.
"""
import dataclasses
import math
import re
from typing import Any

from efficient_lm.errors import Misfit
from efficient_lm.lazy import lazy

coverage = lazy('efficient_lm.compression.coverage')
jax = lazy('jax')
tree = lazy('efficient_lm.tree')
weights = lazy('efficient_lm.weights.weight')

# The matrices of the layers: attention's, feed-forward's, experts'. Not the router, which decides more than it costs.
LAYERS = r'stacks/.*/(query|key|value|output|latent|gate|up|down)\w*$'


@dataclasses.dataclass(kw_only=True)
class Rule:
  """`weights` and `activations` of the products of weights whose path matches `where`: formats of `efficient_lm.formats`, or
  None for floats. Both None keeps a weight as it is, from rules that follow. Activations are rounded token by token."""
  where: str = LAYERS
  weights: Any = None
  activations: Any = None

  def check(self):
    try: re.compile(self.where)
    except re.error as error: yield 'where', self.where, f'must be a regular expression: {error}'

  @property
  def keeps(self) -> bool: return self.weights is None and self.activations is None


def check_rules(rules):
  """Complaints about a tuple of rules, for the class whose field `rules` they are."""
  if not rules: yield 'rules', rules, 'must hold at least one Rule(…)'


def assign(model, rules) -> dict[str, Rule]:
  """The rule of each weight that one decides, by path. Raises Misfit for a rule that decides nothing."""
  paths = [path for path, _ in tree.select(model, weights.Weight)]
  decided = {path: rule for path in paths if (rule := first(rules, path)) is not None}
  for i, rule in enumerate(rules):
    if any(one is rule for one in decided.values()): continue
    found = [path for path in paths if re.search(rule.where, path)]
    why = f'the rules before it decide all that it matches, such as {found[0]}' if found else (
      f'no weight matches; the paths are {", ".join(paths[:8])}{" …" if len(paths) > 8 else ""}')
    raise Misfit(f'rules[{i}] with where={rule.where!r} decides nothing: {why}')
  return decided


def first(rules, path: str) -> Rule | None:
  """The first rule that matches."""
  return next((rule for rule in rules if re.search(rule.where, path)), None)


def apply(model, rules, change):
  """The model with change(path, weight, rule) for each weight that a rule decides and does not keep; itself if all do.
  What `change` refuses is refused with the weight's path."""
  decided = {path: rule for path, rule in assign(model, rules).items() if not rule.keeps}
  if not decided: return model

  def of(path, weight):
    if path not in decided: return weight
    try: return change(path, weight, decided[path])
    except Misfit as error: raise Misfit(f'{path}: {error}') from error
  return tree.rewrite(model, weights.Weight, of)


@dataclasses.dataclass(frozen=True)
class Line:
  """Of the table: a weight's path, what it is and how it is multiplied, its bytes as stored, and those of float32."""
  path: str
  kind: str
  product: str
  num_bytes: int
  float_bytes: int


def table(model) -> list[Line]:
  """Every weight of a model, as it is now. Works on shapes as on arrays."""
  def line(path, weight):
    shape = jax.eval_shape(lambda weight: weight.materialize(), weight).shape
    return Line(path, weight.kind, weight.product, tree.num_bytes(weight), 4 * math.prod(shape))
  return [line(path, weight) for path, weight in tree.select(model, weights.Weight)]


def describe(model, rules, technique: str) -> str:
  """What rules reach in the model before they are applied, in a line."""
  reached = [path for path, rule in assign(model, rules).items() if not rule.keeps]
  return coverage.coverage(model, '|'.join(f'^{re.escape(path)}$' for path in reached)).describe(technique)
