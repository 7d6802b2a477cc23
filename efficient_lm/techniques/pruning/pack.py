"""Pruned weights stored without their zeros: a stage after pruning, and after what trains or quantizes."""
import dataclasses

from efficient_lm.compression.rules import check_pattern
from efficient_lm.errors import IncompatibleError


@dataclasses.dataclass(kw_only=True)
class Pack:
  """Stores masked float weights whose path matches `where` as the numbers that are kept and where they stand: of 2:4 half of
  the numbers and 2 bits for each, of other masks a bit for each entry. The same model, bit for bit, in fewer bytes, and no
  faster: products unpack it. What is stored in few bits stays as it is. A model in which nothing is masked is an error."""
  where: str = ''

  def check(self): yield from check_pattern(self, 'where')

  def __call__(self, model, context):
    from efficient_lm import tree
    from efficient_lm.weights.packed_masked import packed
    found = self.masked(model)
    small = {path: packed(weight) for path, weight in found.items()}
    made = tree.rewrite(model, self.kind, lambda path, weight: small.get(path, weight))
    before, after = (sum(map(tree.num_bytes, weights.values())) for weights in (found, small))
    return made, (f'Pack: {len(small)} masked weights in {after / before:.1%} of the bytes; products unpack them first',)

  def abstract(self, model):
    """As it is: how many numbers are kept, no shape tells. Raises IncompatibleError where nothing is masked."""
    self.masked(model)
    return model

  @property
  def kind(self):
    from efficient_lm.weights.masked import Masked
    return Masked

  def masked(self, model) -> dict:
    from efficient_lm import tree
    from efficient_lm.weights.weight import Dense
    found = {path: weight for path, weight in tree.select(model, self.kind, self.where) if isinstance(weight.inner, Dense)}
    if found: return found
    raise IncompatibleError(f'Pack: no float weight on a path that matches {self.where!r} is masked: prune first')
