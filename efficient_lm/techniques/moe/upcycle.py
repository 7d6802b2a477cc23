"""Sparse upcycling: a trained dense model becomes a mixture of experts that starts from what it knows."""
import dataclasses
from typing import Any

from efficient_lm.compression.rules import check_pattern
from efficient_lm.models.moe import routing


@dataclasses.dataclass(kw_only=True)
class Upcycle:
  """Copies each dense feed-forward layer whose path matches `where` to `num_experts` experts behind a new router
  (Komatsuzaki et al. 2023). Where the chosen experts' gates sum to one the model computes at first what it did before;
  with one expert it stays the dense model exactly."""
  num_experts: int
  router: Any = dataclasses.field(default_factory=lambda: routing.SoftmaxTopK(top_k=2))
  balance: tuple[Any, ...] = (routing.LoadBalance(), routing.RouterZ())
  where: str = r'mlp$'

  touches = 'model'

  def check(self):
    yield from check_pattern(self, 'where')
    if self.num_experts < 1: yield 'num_experts', self.num_experts, 'must be at least 1'
    else:
      for field, value, fix in self.router.check_experts(self.num_experts): yield f'router.{field}', value, fix

  def __call__(self, learner, key):
    from efficient_lm.compression.experts import upcycled
    from efficient_lm.models.mlp import FeedForward
    from efficient_lm.models.spec import MoE
    from efficient_lm.tree import rewrite
    if self.num_experts == 1:
      rewrite(learner.model, FeedForward, lambda _, dense: dense, self.where)   # refuses a pattern that finds nothing
      return learner
    mixture = lambda hidden: MoE(num_experts=self.num_experts, hidden=hidden, router=self.router, balance=self.balance)
    model, paths = upcycled(learner.model, mixture, self.where, key)
    note = f'Upcycle: {", ".join(paths)} to {self.num_experts} experts each'
    return learner.replace(model=model, notes=(*learner.notes, note))

  def follow(self, invariants: dict[str, tuple]) -> dict[str, tuple]:
    """What is promised of a layer's weights is promised of each of its copies."""
    from efficient_lm.compression.experts import followed
    return invariants if self.num_experts == 1 else followed(invariants, self.where, self.num_experts)
