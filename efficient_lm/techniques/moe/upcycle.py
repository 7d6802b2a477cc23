"""Sparse upcycling: a trained dense model becomes a mixture of experts that starts from what it knows."""
import dataclasses
from typing import Any

from efficient_lm.lazy import lazy
from efficient_lm.models import spec
from efficient_lm.models.moe import routing

jax = lazy('jax')
jnp = lazy('jax.numpy')
mlp = lazy('efficient_lm.models.mlp')
nnx = lazy('flax.nnx')
tree = lazy('efficient_lm.tree')
weights = lazy('efficient_lm.weights.weight')


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
    if self.num_experts < 1: yield 'num_experts', self.num_experts, 'must be at least 1'
    else:
      for field, value, fix in self.router.check_experts(self.num_experts): yield f'router.{field}', value, fix

  def __call__(self, learner, key):
    if self.num_experts == 1:
      tree.rewrite(learner.model, mlp.FeedForward, lambda _, dense: dense, self.where)   # says what there is
      return learner
    found = dict(tree.select(learner.model, mlp.FeedForward, self.where))
    keys = dict(zip(found, jax.random.split(key, max(len(found), 1))))

    def over_layers(path, feed_forward):
      num_layers = jax.tree.leaves(feed_forward)[0].shape[0]
      return jax.jit(jax.vmap(self.mixture))(feed_forward, jax.random.split(keys[path], num_layers))

    model = tree.rewrite(learner.model, mlp.FeedForward, over_layers, self.where)
    note = f'Upcycle: {", ".join(found)} to {self.num_experts} experts each'
    return learner.replace(model=model, notes=(*learner.notes, note))

  def mixture(self, feed_forward, key):
    """The MoE of one layer: every expert a copy of the dense layer, whatever kind its weights are."""
    dim, hidden = feed_forward.gate.materialize().shape
    made = spec.MoE(num_experts=self.num_experts, hidden=hidden, router=self.router, balance=self.balance)
    mixture = made.build(spec.Site(dim, 1, 1e-6), rngs=nnx.Rngs(params=key))
    for name in ('gate', 'up', 'down'):
      setattr(mixture.experts, name, self._copies(getattr(feed_forward, name)))
    return mixture

  def _copies(self, weight):
    def stacked(_, dense):
      array = dense.array.get_value()
      return weights.Dense(jnp.broadcast_to(array, (self.num_experts, *array.shape)), 'E' + dense.axes, dense.inputs)
    return tree.rewrite(weight, weights.Dense, stacked)
