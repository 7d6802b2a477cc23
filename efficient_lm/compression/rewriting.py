"""Rewriting the weights that a pattern or rules select, and saying what was reached."""
import dataclasses
import math
import re

from efficient_lm import tree
from efficient_lm.compression.coverage import coverage
from efficient_lm.compression.rules import Rule
from efficient_lm.errors import IncompatibleError
from efficient_lm.weights.biased import beneath
from efficient_lm.weights.block_sparse import BlockSparse
from efficient_lm.weights.fake_quantized import FakeQuantized, Normalized
from efficient_lm.weights.layout import matrix_shape
from efficient_lm.weights.low_precision import LowPrecision
from efficient_lm.weights.quantized import Quantized
from efficient_lm.weights.thresholded import Thresholded
from efficient_lm.weights.weight import Weight


def assign(model, rules) -> dict[str, Rule]:
  """The rule of each weight that one decides, by path, with formats that fit the weight (see `fitted`). Raises
  IncompatibleError for a rule that decides nothing, and for a weight that a format does not fit."""
  weights = dict(tree.select(model, Weight))
  paths = list(weights)
  decided = {path: rule for path in paths if (rule := first(rules, path)) is not None}
  for i, rule in enumerate(rules):
    if any(one is rule for one in decided.values()): continue
    found = [path for path in paths if re.search(rule.where, path)]
    why = f'the rules before it decide all that it matches, such as {found[0]}' if found else (
      f'no weight matches; the paths are {", ".join(paths[:8])}{" …" if len(paths) > 8 else ""}')
    raise IncompatibleError(f'rules[{i}] with where={rule.where!r} decides nothing: {why}')
  return {path: named(path, fitted, weights[path], rule) for path, rule in decided.items()}


def fitted(weight: Weight, rule: Rule) -> Rule:
  """The rule with groups or blocks that divide the weight's matrix (see `Format.fitted`); itself if its own do."""
  outputs, inputs = matrix_shape(weight)
  weights = rule.weights and rule.weights.fitted(outputs, inputs)
  activations = rule.activations and rule.activations.fitted(1, inputs)
  if (weights, activations) == (rule.weights, rule.activations): return rule
  return dataclasses.replace(rule, weights=weights, activations=activations)


def first(rules, path: str) -> Rule | None:
  """The first rule that matches."""
  return next((rule for rule in rules if re.search(rule.where, path)), None)


def apply(model, rules, change):
  """The model with change(path, weight, rule) for each weight that a rule decides and does not keep; itself if all do.
  What `change` refuses is refused with the weight's path. A bias stays around what has been changed."""
  decided = {path: rule for path, rule in assign(model, rules).items() if not rule.keeps}
  if not decided: return model
  return tree.rewrite(model, Weight, lambda path, weight: (
    _beneath(path, weight, change, decided[path]) if path in decided else weight))


def apply_where(model, where: str, change):
  """The model with change(path, weight) for each weight whose path matches. Raises IncompatibleError if none does; what
  `change` refuses is refused with the weight's path. A bias stays around what has been changed."""
  return tree.rewrite(model, Weight, lambda path, weight: _beneath(path, weight, change), where)


def _beneath(path: str, weight: Weight, change, *arguments) -> Weight:
  return beneath(weight, lambda inner: named(path, change, path, inner, *arguments))


def named(path: str, function, *arguments):
  """function(*arguments); what it refuses is refused with the weight's path."""
  try: return function(*arguments)
  except IncompatibleError as error:
    says = str(error)   # 'is stored as …' of the weight, or what is wrong with a setting
    raise IncompatibleError(f'{path} {says}' if says.startswith(('is ', 'has ')) else f'{path}: {says}') from error


def is_float(weight: Weight) -> bool:
  """Whether it may have another matrix. A weight in low precision may: that is how gradients were computed."""
  return not dict(tree.select(weight, (Quantized, FakeQuantized, Normalized, BlockSparse)))


def require_float(weight: Weight):
  """Raises IncompatibleError, with what it is, for a weight that has been quantized, or is stored in blocks, where only a
  float matrix will do."""
  if dict(tree.select(weight, (Quantized, BlockSparse))): raise IncompatibleError(f'is stored as {weight.kind} already')
  if dict(tree.select(weight, Thresholded)): raise IncompatibleError('has thresholds of its inputs: let Teal(…) follow this')
  if is_float(weight): return
  in_few_bits = any(one.weights is not None for _, one in tree.select(weight, FakeQuantized))
  fix = 'the stage Convert() stores it so' if in_few_bits else 'what it does to its input would be lost'
  raise IncompatibleError(f'is trained as {weight.kind}: {fix}')


def require_trainable(weight: Weight):
  """Raises IncompatibleError for a weight that is stored in few bits, which is frozen, so no training can change it, and for
  one that is stored in blocks, which are trained as they are."""
  if dict(tree.select(weight, Quantized)): raise IncompatibleError(f'is stored as {weight.kind}: training cannot change it')
  if dict(tree.select(weight, BlockSparse)): raise IncompatibleError(f'is stored as {weight.kind}: train it without')


def without_low_precision(model):
  """The model with its weights' products in floats: how gradients were computed is of no use after training."""
  if not dict(tree.select(model, LowPrecision)): return model
  return tree.rewrite(model, LowPrecision, lambda _, weight: weight.inner)


@dataclasses.dataclass(frozen=True)
class Line:
  """Of the table: a weight's path, what it is stored as and how it is multiplied, its bytes as stored, and those of
  float32."""
  path: str
  kind: str
  product: str
  num_bytes: int
  float_bytes: int


def table(model) -> list[Line]:
  """Every weight of a model, as it is now. Works on shapes as on arrays."""
  return [Line(path, weight.kind, weight.product, tree.num_bytes(weight), 4 * math.prod(weight.shape))
          for path, weight in tree.select(model, Weight)]


def describe(model, rules, technique: str) -> str:
  """What rules reach in the model before they are applied, and whose formats do not divide the weights, in a line."""
  decided = {path: rule for path, rule in assign(model, rules).items() if not rule.keeps}
  note = coverage(model, '|'.join(f'^{re.escape(path)}$' for path in decided)).describe(technique)
  pairs = ((path, asked, found) for path, rule in decided.items() for asked, found in (
    (first(rules, path).weights, rule.weights), (first(rules, path).activations, rule.activations)))
  return '; '.join([note, *replaced(pairs)])


def replaced(pairs) -> list[str]:
  """Notes on formats that were fitted to weights, from (path, format asked for, format found)."""
  changed = {}
  for path, asked, found in pairs:
    if asked != found: changed.setdefault(f'{found.name} in place of {asked.name}, which does not divide', []).append(path)
  return [f'{what} {_listed(paths)}' for what, paths in changed.items()]


def _listed(paths: list[str]) -> str:
  return f'{paths[0]} and {len(paths) - 1} more' if len(paths) > 1 else paths[0]
