"""What is to be left of a model: sizes of its dimensions, of a description (`models.spec`) or of a model. Nothing here loads
JAX before a model is asked about."""
import dataclasses
import math
from typing import Any

from efficient_lm.errors import IncompatibleError, Problem
from efficient_lm.models import spec

SIZES = ('width', 'layers', 'heads', 'kv_heads', 'hidden', 'experts', 'expert_hidden')


@dataclasses.dataclass(kw_only=True, unsafe_hash=True)
class Shape:
  """How much stays of each dimension: a share of what is there, up to 1.0, or a whole number that counts, or None, all.
  Layers of one stack stay alike: each keeps as many as all others, and which they are is its own affair.

  width: of the residual stream. layers: of all of them; stacks give up equal shares, a repeated pattern whole repeats.
  heads: query heads, equally many of those that share a key-value head; it goes with them where each has one of its own.
  kv_heads: each with the query heads that share it. hidden: units of dense and of shared feed-forward layers. experts: of a
  router with groups equally many of each, or, where those do not divide, whole groups. expert_hidden: units of each expert.
  multiple: what sizes that a share gives are rounded to multiples of, but for counts of heads, layers and experts."""
  width: float | None = None
  layers: float | None = None
  heads: float | None = None
  kv_heads: float | None = None
  hidden: float | None = None
  experts: float | None = None
  expert_hidden: float | None = None
  multiple: int = 1

  def check(self):
    if self.multiple < 1: yield 'multiple', self.multiple, 'must be at least 1'
    for name in SIZES: yield from check_size(name, getattr(self, name))

  @property
  def asked(self) -> tuple[str, ...]:
    """Names of the sizes that it sets."""
    return tuple(name for name in SIZES if getattr(self, name) is not None)

  @property
  def text(self) -> str:
    """Its sizes, as they are written."""
    return ', '.join(f'{name}={getattr(self, name):g}' for name in self.asked)

  def resolve(self, model, mesh=None) -> tuple['Shape', ...]:
    """Candidates for a model: itself (see `compression.budget`)."""
    del model, mesh
    return (self,)

  def notes(self, model, smaller, mesh) -> tuple[str, ...]:
    """On what was measured to find it: nothing."""
    del model, smaller, mesh
    return ()

  def described(self, model: spec.Transformer) -> spec.Transformer:
    """The description of what stays of a model with this one: what would be trained from scratch for comparison. Raises
    IncompatibleError for sizes that the model does not have."""
    unused = set(self.asked) - _present(model)
    if unused: raise IncompatibleError(f'{sorted(unused)[0]}: the model has none')
    dim = self.size('width', model.dim)
    layers = self.of_stacks([stack.num_layers for stack in model.stacks], [_pattern(stack) for stack in model.stacks])
    stacks = tuple(self._stack(stack, count) for stack, count in zip(model.stacks, layers) if count)
    ends = model.ends
    if ends.embed_scale == math.sqrt(model.dim): ends = dataclasses.replace(ends, embed_scale=math.sqrt(dim))
    return dataclasses.replace(model, dim=dim, stacks=stacks, ends=ends)

  def _stack(self, stack, num_layers: int):
    part = lambda one: dict(attention=self._attention(one.attention), mlp=self._mlp(one.mlp))
    if not isinstance(stack, spec.Repeated): return dataclasses.replace(stack, num_layers=num_layers, **part(stack))
    layers = tuple(dataclasses.replace(layer, **part(layer)) for layer in stack.layers)
    return dataclasses.replace(stack, num_repeats=num_layers // len(layers), layers=layers)

  def _attention(self, one):
    groups = one.num_kv_heads if isinstance(one, spec.GroupedQuery) else one.num_heads
    heads, groups = self.of_heads(one.num_heads, groups, latent=isinstance(one, spec.Latent))
    changes = {} if isinstance(one, spec.Latent) else dict(num_kv_heads=groups)
    return dataclasses.replace(one, num_heads=heads, **changes)

  def _mlp(self, one):
    if isinstance(one, spec.SigmoidGated): return dataclasses.replace(one, inner=self._mlp(one.inner))
    if not isinstance(one, spec.MoE): return dataclasses.replace(one, hidden=self.size('hidden', one.hidden))
    hidden = self.size('expert_hidden', one.hidden)
    changes: dict[str, Any] = dict(hidden=hidden)
    if one.shared is not None: changes['shared'] = self._mlp(one.shared)
    if one.num_shared:
      # Several shared experts are one layer, which may be left with another width than so many experts have.
      width = self.size('hidden', one.num_shared * one.hidden)
      changes |= dict(num_shared=width // hidden) if width % hidden == 0 else dict(
        num_shared=0, shared=spec.SwiGLU(hidden=width))
    experts = self.size('experts', one.num_experts)
    return dataclasses.replace(one, num_experts=experts, router=router_of(one.router, one.num_experts, experts), **changes)

  def size(self, name: str, size: int) -> int:
    """What stays of a dimension of this size. Raises IncompatibleError for more than there is."""
    asked = getattr(self, name)
    if asked is None: return size
    multiple = self.multiple if name in ('width', 'hidden', 'expert_hidden') else 1
    if is_share(asked): return min(size, max(1, round(asked * size / multiple)) * multiple)
    if asked > size: raise IncompatibleError(f'{name} = {asked:g}: there are {size}')
    return int(asked)

  def of_heads(self, heads: int, groups: int, latent: bool = False) -> tuple[int, int]:
    """Query heads and key-value heads that stay. Raises IncompatibleError for heads that groups cannot share."""
    alone = heads == groups
    if latent and self.kv_heads is not None: raise IncompatibleError('kv_heads: latent attention has none, name heads')
    if alone and self.heads is not None:
      left = self.size('heads', heads)
      if self.kv_heads is not None and self.size('kv_heads', groups) != left:
        raise IncompatibleError('kv_heads: each has a query head of its own here, name heads alone')
      return left, left
    left = self.size('kv_heads', groups)
    each = heads // groups
    if self.heads is None: return left * each, left
    # A share is one of those that share a kept head.
    total = left * self.size('heads', each) if is_share(self.heads) else self.size('heads', heads)
    if total % left or total > left * each:
      raise IncompatibleError(f'heads = {total}: {left} key-value heads, of {each} query heads each, must keep equally many')
    return total, left

  def of_stacks(self, layers: list[int], patterns: list[int]) -> list[int]:
    """Layers that stay of each stack, given how many each has, of patterns so long. Raises IncompatibleError where patterns
    would be left in part."""
    total = sum(layers)
    left = self.size('layers', total)
    exact = [left * count / total for count in layers]
    found = [int(one / pattern + 1e-9) * pattern for one, pattern in zip(exact, patterns)]
    while sum(found) < left:   # what rounding has left, to those that lack the most
      i = max(range(len(found)), key=lambda i: (exact[i] - found[i], -i))
      if sum(found) + patterns[i] > left:
        whole = patterns[i]
        raise IncompatibleError(f'layers = {left}: layers go by whole repeats of a pattern of {whole}; Unroll() frees them')
      found[i] += patterns[i]
    return found


def is_share(size: float) -> bool:
  """Whether a size is a share, not a count: 1.0 is all, 1 is one."""
  return isinstance(size, float) and size <= 1


def check_size(name: str, value: float | None) -> list[Problem]:
  """The problem of what is no size."""
  if value is None or (value > 0 and (is_share(value) or value == int(value))): return []
  return [(name, value, 'must be a share above 0 and at most 1.0, or a whole number, or None')]


def router_of(router, num_experts: int, left: int):
  """A router of as many experts of `num_experts` as are left. Raises IncompatibleError for fewer than a token visits, and
  for groups that would be unequal."""
  if hasattr(router, 'inner'): return dataclasses.replace(router, inner=router_of(router.inner, num_experts, left))
  groups = getattr(router, 'num_groups', 1)
  if groups > 1 and left % groups:
    each = num_experts // groups
    if left % each:
      raise IncompatibleError(f'experts = {left}: the router has {groups} groups of {each}: keep a multiple of {groups}, '
                              f'equally many of each group, or of {each}, whole groups')
    router = dataclasses.replace(router, num_groups=left // each, top_groups=min(router.top_groups, left // each))
  for field, value, fix in router.check_experts(left):
    raise IncompatibleError(f'experts = {left}: router.{field} = {value} {fix}')
  return router


def _pattern(stack) -> int:
  return len(stack.layers) if isinstance(stack, spec.Repeated) else 1


def _present(model: spec.Transformer) -> set[str]:
  """Names of the sizes that a model has."""
  found, layers = {'width', 'layers', 'heads'}, model.layers
  if any(isinstance(layer.attention, spec.GroupedQuery) for layer in layers): found.add('kv_heads')
  mixtures = [layer.mlp for layer in layers if isinstance(layer.mlp, spec.MoE)]
  if mixtures: found |= {'experts', 'expert_hidden'}
  if len(mixtures) < len(layers) or any(one.shared or one.num_shared for one in mixtures): found.add('hidden')
  return found
