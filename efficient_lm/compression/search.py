"""Which weight deserves how many bits: the harm that each does by itself, and formats for all under a budget of bytes.

Harm is the divergence of the next-token distribution from the float model's, with that one weight rounded to nearest and all
else float; it is taken to add up, which holds while it is small. The plan is a tuple of rules to be pasted into a config:

  found = sensitivities(model, batches, formats=(Int(bits=2, scales=g), Int(bits=4, scales=g), Int()))
  print(pasted(choose(found, budget=500_000)))

`python -m efficient_lm.sensitivity` does so for a trained model, and measures what the plan as a whole is worth.
"""
import dataclasses
import math
import re
from typing import Any

from efficient_lm.compression import rules
from efficient_lm.compression.calibration import EMPTY, compiled
from efficient_lm.compression.rules import Rule
from efficient_lm.errors import Misfit
from efficient_lm.lazy import lazy

jax = lazy('jax')
jnp = lazy('jax.numpy')
losses = lazy('efficient_lm.training.losses')
quantized = lazy('efficient_lm.weights.quantized')
rotation = lazy('efficient_lm.weights.rotated')
tree = lazy('efficient_lm.tree')
weights = lazy('efficient_lm.weights.weight')
wiring = lazy('efficient_lm.compression.coupling')


@dataclasses.dataclass(frozen=True)
class Sensitivity:
  """A weight (of all layers of its stack) in a format: bytes as stored; `sqnr`, signal to quantization noise of the weight
  itself, in dB; `divergence`, KL(float || rounded) of the model's output, in nats a token."""
  path: str
  format: Any
  num_bytes: int
  sqnr: float
  divergence: float


def sensitivities(model, batches, formats, where: str = rules.LAYERS) -> list[Sensitivity]:
  """Of each weight whose path matches `where`, in each format. Raises Misfit if no weight does, or there is no batch."""
  batches = list(batches)
  found = chosen(model, where)
  return [_sensitivity(model, path, weight, format, batches) for path, weight in found.items() for format in formats]


def chosen(model, where: str) -> dict[str, Any]:
  """Weights by path. Raises Misfit if there is none, or one that has been rounded already."""
  found = dict(tree.select(model, weights.Weight, where))
  for path, weight in found.items():
    try: wiring.require_float(weight)
    except Misfit as error: raise Misfit(f'{path} {error}') from error
  if not found: tree.rewrite(model, weights.Weight, lambda _, weight: weight, where)   # says what there is
  return found


def _sensitivity(model, path: str, weight, format, batches) -> Sensitivity:
  inner, noise = compiled(_rounded, static_argnames='format')(rotation.innermost(weight), format=format)
  changed = tree.rewrite(model, weights.Weight, lambda at, old: (
    rotation.within(old, lambda _: inner) if at == path else old))
  size = num_bytes(weight, format)
  return Sensitivity(path, format, size, -10 * math.log10(max(float(noise), 1e-30)), divergence(model, changed, batches))


def num_bytes(weight, format) -> int:
  """Of a weight as it would be stored."""
  return tree.num_bytes(jax.eval_shape(lambda weight: quantized.quantized(weight, format), rotation.innermost(weight)))


def together(model, batches, plan) -> tuple[int, float]:
  """Of all that the rules of a plan name, rounded to nearest at once: their bytes, and the divergence of the model."""
  found, decided = dict(tree.select(model, weights.Weight)), rules.assign(model, plan)
  size = sum(num_bytes(found[path], rule.weights) for path, rule in decided.items() if rule.weights is not None)
  to_nearest = compiled(_rounded, static_argnames='format')
  change = lambda path, weight, rule: rotation.within(weight, lambda inner: to_nearest(inner, format=rule.weights)[0])
  return size, divergence(model, rules.apply(model, plan, change), batches)


def divergence(model, changed, batches) -> float:
  """Mean over the tokens of all batches of KL(model || changed), in nats. Raises Misfit if there is no batch."""
  found = [float(compiled(_divergence)(model, changed, batch)) for batch in batches]
  if not found: raise Misfit(EMPTY)
  return sum(found) / len(found)


def _rounded(weight, *, format):
  """The weight rounded to nearest, in floats, so that the model stays the same program; and the noise over the signal."""
  layout = quantized.Layout.of(weight)
  matrix_NK = layout.matrix(weight.materialize())
  rounded_NK = format.rounded(matrix_NK, format.scales_for(matrix_NK))
  noise = jnp.sum(jnp.square(rounded_NK - matrix_NK)) / jnp.maximum(jnp.sum(jnp.square(matrix_NK)), 1e-30)
  return weights.Dense(layout.array(rounded_NK), weight.axes, weight.inputs), noise


def _divergence(model, changed, batch):
  """Mean over tokens of KL(model || changed), in nats."""
  log_p, log_q = (jax.nn.log_softmax(losses.outputs_of(one, batch).logits_BTV) for one in (model, changed))
  return jnp.mean(jnp.sum(jnp.exp(log_p) * (log_p - log_q), -1))


def choose(found: list[Sensitivity], budget: int) -> tuple[Rule, ...]:
  """Rules under which the weights take at most `budget` bytes together. All start in their smallest format, and as long as
  there is room the change that prevents most divergence for a byte is made. Raises Misfit for too small a budget."""
  options = {one.path: sorted((other for other in found if other.path == one.path), key=lambda other: other.num_bytes)
             for one in found}
  now = {path: choices[0] for path, choices in options.items()}
  spent = sum(one.num_bytes for one in now.values())
  if spent > budget: raise Misfit(f'{budget} bytes are too few: the smallest formats take {spent}')
  while better := [new for path, old in now.items() for new in options[path] if old.num_bytes < new.num_bytes <=
                   old.num_bytes + budget - spent and new.divergence < old.divergence]:
    gain = lambda new: (now[new.path].divergence - new.divergence) / (new.num_bytes - now[new.path].num_bytes)
    best = max(better, key=gain)
    spent += best.num_bytes - now[best.path].num_bytes
    now[best.path] = best
  return tuple(Rule(where=f'^{re.escape(path)}$', weights=one.format) for path, one in now.items())


def pasted(plan: tuple[Rule, ...]) -> str:
  """The rules as a config writes them."""
  return '(\n' + ''.join(f'  {rule!r},\n' for rule in plan) + ')'
