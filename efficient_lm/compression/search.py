"""Which weight deserves how many bits: the harm that each does by itself, and formats for all under a budget of bytes.

Harm is the divergence of the next-token distribution from the float model's, with that one weight quantized by
round-to-nearest (RTN) and all else float; it is taken to add up, which holds while it is small. The plan is a tuple of rules
to be pasted into a config:

  found = sensitivities(model, batches, formats=(Int(bits=2, scales=g), Int(bits=4, scales=g), Int()))
  print(pasted(choose(found, budget=500_000)))

`python -m efficient_lm.sensitivity` does so for a trained model, and measures the divergence of the plan as a whole.
"""
import dataclasses
import functools
import math
import re
from typing import Any

import jax
import jax.numpy as jnp

from efficient_lm import tree
from efficient_lm.compression import layerwise, rewriting
from efficient_lm.compression.calibration import EMPTY
from efficient_lm.compression.method import RoundToNearest
from efficient_lm.compression.rules import LAYERS, Rule
from efficient_lm.errors import IncompatibleError
from efficient_lm.training import losses
from efficient_lm.weights.layout import matrix_shape
from efficient_lm.weights.rotated import innermost, within
from efficient_lm.weights.weight import Dense, Weight


@dataclasses.dataclass(frozen=True)
class Sensitivity:
  """A weight (of all layers of its stack) in a format: bytes as stored; `sqnr`, signal to quantization noise of the weight
  itself, in dB; `divergence`, KL(float || rounded) of the model's output, in nats a token."""
  path: str
  format: Any
  num_bytes: int
  sqnr: float
  divergence: float


def sensitivities(model, batches, formats, where: str = LAYERS) -> list[Sensitivity]:
  """Of each weight whose path matches `where`, in each format, with groups or blocks that divide the weight (see
  `formats.Format.fitted`, and `rewriting.replaced` for what to say of it). Raises IncompatibleError if no weight does, or
  there is no batch."""
  batches = list(batches)
  found = chosen(model, where)
  return [_sensitivity(model, path, weight, format.fitted(*matrix_shape(weight)), batches)
          for path, weight in found.items() for format in formats]


def chosen(model, where: str) -> dict[str, Any]:
  """Weights by path. Raises IncompatibleError if there is none, or one that has been rounded already."""
  found = dict(tree.select(model, Weight, where))
  for path, weight in found.items(): rewriting.named(path, rewriting.require_float, weight)
  if not found: tree.rewrite(model, Weight, lambda _, weight: weight, where)   # says what there is
  return found


def _sensitivity(model, path: str, weight, format, batches) -> Sensitivity:
  inner, noise = _to_nearest(innermost(weight), format=format)
  changed = tree.rewrite(model, Weight, lambda at, old: within(old, lambda _: inner) if at == path else old)
  size = num_bytes(weight, format)
  return Sensitivity(path, format, size, -10 * math.log10(max(float(noise), 1e-30)), divergence(model, changed, batches))


def num_bytes(weight, format) -> int:
  """Of a weight as it would be stored."""
  return tree.num_bytes(jax.eval_shape(functools.partial(_stored, format=format), innermost(weight)))


def together(model, batches, plan) -> tuple[int, float]:
  """Of all that the rules of a plan name, quantized by RTN at once: their bytes, and the divergence of the model."""
  found, decided = dict(tree.select(model, Weight)), rewriting.assign(model, plan)
  size = sum(num_bytes(found[path], rule.weights) for path, rule in decided.items() if rule.weights is not None)
  change = lambda path, weight, rule: within(weight, lambda inner: _to_nearest(inner, format=rule.weights)[0])
  return size, divergence(model, rewriting.apply(model, plan, change), batches)


def divergence(model, changed, batches) -> float:
  """Mean over the tokens of all batches, padding left out, of KL(model || changed), in nats. Raises IncompatibleError if
  there is none."""
  found = [jax.device_get(_divergence(model, changed, batch)) for batch in batches]
  if not found: raise IncompatibleError(EMPTY)
  nats, tokens = (float(sum(values)) for values in zip(*found))
  return nats / tokens


def divergence_note(model, changed, batches) -> str:
  """What the output errors of single products do not tell: how far the whole model has moved from the float one. (Of
  SmolLM2-135M in 3 bits, GPTQ left a third of AWQ's output error, and AWQ had the better perplexity.)"""
  tokens = sum(int(jnp.sum(batch['segments_BT'] > 0)) for batch in batches)
  try: nats = divergence(model, changed, batches)
  except IncompatibleError as error: return f'KL to the float model: not computed: {error}'   # of soft-capped logits
  return f'KL to the float model: {nats:.4f} nats a token, of {tokens} calibration tokens'


def _stored(weight, format):
  """A weight as the stage stores it by RTN: with its mask around it, if the format has no zero."""
  return layerwise.nearest('', weight, Rule(weights=format), RoundToNearest())


@functools.partial(jax.jit, static_argnames='format')
def _to_nearest(weight, *, format):
  """The weight quantized by RTN, in floats, so that the model stays the same program; and the noise over the signal."""
  array, quantized = weight.materialize(), _stored(weight, format).materialize()
  noise = jnp.sum(jnp.square(quantized - array)) / jnp.maximum(jnp.sum(jnp.square(array)), 1e-30)
  return Dense(quantized, weight.axes, weight.inputs), noise


@jax.jit
def _divergence(model, changed, batch):
  """KL(model || changed) in nats, summed over tokens, and their number. Logits are never built as a whole."""
  before, after = (losses.last_layer(losses.outputs_of(one, batch)) for one in (model, changed))
  real_BT = batch['segments_BT'] > 0
  return jnp.sum(losses.divergence(after, before, kind='forward_kl') * real_BT), jnp.sum(real_BT)


def choose(found: list[Sensitivity], budget: int) -> tuple[Rule, ...]:
  """Rules under which the weights take at most `budget` bytes together. All start in their smallest format, the best of
  those that are equally small, and as long as there is room the change that prevents most divergence for a byte is made.
  Raises IncompatibleError for too small a budget."""
  in_order = lambda one: (one.num_bytes, one.divergence)
  options = {one.path: sorted((other for other in found if other.path == one.path), key=in_order) for one in found}
  now = {path: choices[0] for path, choices in options.items()}
  spent = sum(one.num_bytes for one in now.values())
  if spent > budget: raise IncompatibleError(f'{budget} bytes are too few: the smallest formats take {spent}')
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
