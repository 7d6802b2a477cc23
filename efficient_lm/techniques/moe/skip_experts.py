"""Dynamic expert skipping: tokens whose first expert is sure of itself do without the others, from here on."""
import dataclasses

from efficient_lm.compression.rules import check_pattern


@dataclasses.dataclass(kw_only=True)
class SkipExperts:
  """Puts `Skipping` around the router of every mixture whose path matches `where`. `beta` None: of each mixture the median,
  over tokens of `sequences` of text, of a token's smallest gate over its largest, so that half of the tokens skip (Lu et al.
  2024, arXiv 2402.14800, section 3.3). Layers that are run by one loop share theirs; Unroll() gives each its own. What a
  training that follows trains is the model that skips."""
  beta: float | None = None
  sequences: int = 128
  where: str = r'mlp$'

  def check(self):
    yield from check_pattern(self, 'where')
    if self.beta is not None and not 0 <= self.beta <= 1:
      yield 'beta', self.beta, 'must be from 0, which skips nothing, to 1, or None: it is found'
    if self.sequences < 1: yield 'sequences', self.sequences, 'must be at least 1'

  def __call__(self, model, context):
    """The model, and the share of choices that are skipped."""
    from efficient_lm.compression import calibration, importance
    batches = calibration.first_batches(context.batches(self.sequences), self.sequences)
    paths = self._paths(model)
    whole = self._skipping(model, dict.fromkeys(paths, 0.0))   # of one that skips already, the gates of all
    found = {path: ratios for path, ratios in importance.gate_ratios(whole, batches).items() if path in paths}
    betas = {path: importance.median(ratios) if self.beta is None else self.beta for path, ratios in found.items()}
    notes = [f'{path}: choices below {betas[path]:.3f} of the largest gate are skipped, '
             f'{importance.share_below(ratios, betas[path]):.1%} of them on {calibration.num_tokens(batches)} tokens'
             for path, ratios in found.items()]
    return self._skipping(model, betas), tuple(notes)

  def abstract(self, model):
    """The same structure; which `beta` it will have may depend on text."""
    return self._skipping(model, dict.fromkeys(self._paths(model), 0.5 if self.beta is None else self.beta))

  def _paths(self, model) -> list[str]:
    """Those of the mixtures. Raises IncompatibleError where none matches, or where experts choose tokens."""
    from efficient_lm import tree
    from efficient_lm.errors import IncompatibleError
    from efficient_lm.models.moe.layer import MoE
    tree.rewrite(model, MoE, lambda _, mixture: mixture, self.where)   # refuses a pattern that finds nothing
    found = dict(tree.select(model, MoE, self.where))
    for path, mixture in found.items():
      if not mixture.route.causal: raise IncompatibleError(f'{path}: its experts choose tokens, which skip none of them')
    return list(found)

  def _skipping(self, model, betas):
    import jax

    from efficient_lm import tree
    from efficient_lm.models.moe.layer import MoE
    from efficient_lm.models.moe.routing import Skipping

    def change(path, mixture):
      if path not in betas: return mixture
      mixture = jax.tree.map(lambda leaf: leaf, mixture)
      inner = mixture.route.inner if isinstance(mixture.route, Skipping) else mixture.route
      mixture.route = Skipping(inner=inner, beta=float(betas[path]))
      return mixture
    return tree.rewrite(model, MoE, change, self.where)
