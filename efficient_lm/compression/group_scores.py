"""How much a model needs each index of its dimensions: scores of groups, by which structured pruning chooses what stays.

What several of them sum over is in `compression.importance`.
"""
import dataclasses

from efficient_lm.compression.scores import Score

config = dataclasses.dataclass(kw_only=True, unsafe_hash=True)


class GroupScore(Score):
  """One that ranks no single entries."""
  of_entries = False


@config
class Activations(GroupScore):
  """Mean absolute activations (Minitron, Muralidharan et al. 2024, arXiv 2407.14679, section 2.2): of hidden units what
  `down` reads, of heads what the output projection reads of them, of residual channels what all layers read of them, after
  their norms."""
  kinds = ('width', 'heads', 'kv_heads', 'hidden', 'expert_hidden')

  def score(self, model, spaces, batches, key):
    from efficient_lm.compression import importance
    return importance.activations(model, spaces, batches)


@config
class BlockInfluence(GroupScore):
  """Of layers: 1 - cosine of what a layer is given and what it leaves, in the mean over tokens (ShortGPT, Men et al. 2024,
  arXiv 2403.03853, eq. 1). Of a repeated pattern: of a whole repeat."""
  kinds = ('layers',)

  def score(self, model, spaces, batches, key):
    from efficient_lm.compression import importance
    return importance.block_influence(model, spaces, batches)


@config
class Frequency(GroupScore):
  """Of experts: how many tokens chose each."""
  kinds = ('experts',)

  def score(self, model, spaces, batches, key):
    from efficient_lm.compression import importance
    return importance.of_experts(model, spaces, batches, importance.frequency)


@config
class Reap(GroupScore):
  """Of experts: gate times the norm of the expert's output, in the mean over the tokens that chose it (REAP, Lasby et al.
  2025, arXiv 2510.13999, eq. 9)."""
  kinds = ('experts',)

  def score(self, model, spaces, batches, key):
    from efficient_lm.compression import importance
    return importance.of_experts(model, spaces, batches, importance.reap)


@config
class Reconstruction(GroupScore):
  """Of experts: the squared error of the layer's output without the one expert, its tokens sent to their next best (Lu et
  al. 2024, arXiv 2402.14800, section 3.1, who try all sets of experts where this takes one out at a time). It runs every
  expert on every token."""
  kinds = ('experts',)

  def score(self, model, spaces, batches, key):
    from efficient_lm.compression import importance
    return importance.of_experts(model, spaces, batches, importance.reconstruction)
