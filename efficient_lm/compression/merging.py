"""Experts that go are joined to those that stay, instead of being dropped."""
import dataclasses


@dataclasses.dataclass(kw_only=True, unsafe_hash=True)
class MergeExperts:
  """Each expert that goes is joined to the expert that stays to which tokens are sent most alike: by the cosine of their
  router logits over text, within its group where a router has groups. Experts are averaged by how many tokens chose them
  (M-SMoE, Li et al. 2024, arXiv 2310.01334, section 3.2), their hidden units first brought into the order in which they
  match those of the one that stays (`align`; an assignment problem of as many units, by weights). The router keeps the
  columns of those that stay."""
  align: bool = True

  def kept(self, model, kept, batches):
    """The whole model with joined experts in the places of those that stay, and `kept` as it is."""
    from efficient_lm.compression import merged_experts
    return merged_experts.merged(model, kept, batches, self.align), kept
