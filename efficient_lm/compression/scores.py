"""How much a model needs each index of its dimensions: scores, by which structured pruning chooses what stays.

A score is a dataclass with `kinds`, the sizes of `Shape` that it can rank, `calibrated`, whether it reads batches of text,
and `score(model, spaces, batches, key) -> {space: (*lead, size)}`, larger where more is lost. What several of them sum
over is in `compression.importance`. Query heads are scored; the score of a key-value head is the sum of theirs. Nothing here
loads JAX before a model is scored.
"""
import dataclasses

from efficient_lm.compression.shape import SIZES

config = dataclasses.dataclass(kw_only=True, unsafe_hash=True)


@config
class Random:
  """By chance: what any other score has to beat."""
  kinds = SIZES
  calibrated = False

  def score(self, model, spaces, batches, key):
    import jax
    import numpy as np
    keys = jax.random.split(key, len(spaces))
    return {space: np.asarray(jax.random.uniform(one, (*space.lead, space.size))) for one, space in zip(keys, spaces)}


@config
class Magnitude:
  """The Euclidean norm of all weights that would be removed (group magnitude, as in LLM-Pruner, arXiv 2305.11627)."""
  kinds = SIZES
  calibrated = False

  def score(self, model, spaces, batches, key):
    import numpy as np

    from efficient_lm.compression import importance
    squares = importance.of_weights(model, lambda _, weight: weight.materialize() ** 2, spaces)
    return {space: np.sqrt(importance.summed(model, space, squares, importance.touched(model, space))) for space in spaces}


@config
class Activations:
  """Mean absolute activations (Minitron, Muralidharan et al. 2024, arXiv 2407.14679, section 2.2): of hidden units what
  `down` reads, of heads what the output projection reads of them, of residual channels what all layers read of them, after
  their norms."""
  kinds = ('width', 'heads', 'kv_heads', 'hidden', 'expert_hidden')
  calibrated = True

  def score(self, model, spaces, batches, key):
    from efficient_lm.compression import importance
    return importance.activations(model, spaces, batches)


@config
class Taylor:
  """How much the loss would change to first order: |sum of weight * gradient| over what would be zero, summed over batches
  (Molchanov et al. 2019, arXiv 1906.10771; LLM-Pruner, arXiv 2305.11627, eq. 3). Over the weights that read an index, or, of
  experts and layers, those that they write with, it is activation * gradient, summed over tokens."""
  kinds = SIZES
  calibrated = True

  def score(self, model, spaces, batches, key):
    from efficient_lm.compression import importance
    return importance.taylor(model, spaces, batches)


@config
class BlockInfluence:
  """Of layers: 1 - cosine of what a layer is given and what it leaves, in the mean over tokens (ShortGPT, Men et al. 2024,
  arXiv 2403.03853, eq. 1). Of a repeated pattern: of a whole repeat."""
  kinds = ('layers',)
  calibrated = True

  def score(self, model, spaces, batches, key):
    from efficient_lm.compression import importance
    return importance.block_influence(model, spaces, batches)


@config
class Frequency:
  """Of experts: how many tokens chose each."""
  kinds = ('experts',)
  calibrated = True

  def score(self, model, spaces, batches, key):
    from efficient_lm.compression import importance
    return importance.of_experts(model, spaces, batches, importance.frequency)


@config
class Reap:
  """Of experts: gate times the norm of the expert's output, in the mean over the tokens that chose it (REAP, Lasby et al.
  2025, arXiv 2510.13999, eq. 9)."""
  kinds = ('experts',)
  calibrated = True

  def score(self, model, spaces, batches, key):
    from efficient_lm.compression import importance
    return importance.of_experts(model, spaces, batches, importance.reap)


@config
class Reconstruction:
  """Of experts: the squared error of the layer's output without the one expert, its tokens sent to their next best (Lu et
  al. 2024, arXiv 2402.14800, section 3.1, who try all sets of experts where this takes one out at a time). It runs every
  expert on every token."""
  kinds = ('experts',)
  calibrated = True

  def score(self, model, spaces, batches, key):
    from efficient_lm.compression import importance
    return importance.of_experts(model, spaces, batches, importance.reconstruction)
