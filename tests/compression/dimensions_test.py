"""What is taken out of a model leaves one that computes what the whole one does where as much is zero, and that describes
itself as the description with the smaller sizes."""
import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_lm import tree
from efficient_lm.compression import dimensions, selection
from efficient_lm.compression.dimensions import Removal, counts, spaces
from efficient_lm.compression.rules import Rule
from efficient_lm.compression.shape import Shape
from efficient_lm.errors import IncompatibleError
from efficient_lm.formats import Int
from efficient_lm.models import spec
from efficient_lm.models.described import alike, described, layers
from efficient_lm.models.moe import routing
from efficient_lm.models.moe.layer import MoE
from efficient_lm.models.transformer import Repeated, Stack, Unrolled, unrolled
from efficient_lm.parallel.sharding import axes_of, shardings
from efficient_lm.runs import invariants
from efficient_lm.techniques.pruning.prune_once import NofM, PruneOnce
from efficient_lm.techniques.quantization.ptq import Quantize
from efficient_lm.weights.weight import Weight
from tests.compressing import (
  ATTENTIONS,
  MLPS,
  STACKS,
  Context,
  D,
  F,
  H,
  V,
  assert_structure,
  assert_the_same,
  drawn,
)
from tests.compressing import FAMILIES as OTHERS

pytestmark = pytest.mark.usefixtures('quick_compilation')

ALONE = spec.GroupedQuery(num_heads=4, num_kv_heads=4, head_dim=H, biases=('query', 'key', 'value', 'output'))
NORMED = spec.GroupedQuery(num_heads=4, num_kv_heads=2, head_dim=H, qk_norm='NH')
GROUPS = spec.MoE(num_experts=8, hidden=24, num_shared=2, balance=(routing.LossFreeBias(),),
                  router=routing.SigmoidTopK(top_k=2, num_groups=4, top_groups=2, scale=2.5))
one = lambda attention, mlp, **more: dict(stacks=(spec.Stack(num_layers=3, attention=attention, mlp=mlp),), **more)
FAMILIES = {
  'llama': one(ATTENTIONS['grouped'], MLPS['dense']),
  'biased': one(ALONE, spec.Gated(hidden=F, biases=('gate', 'up', 'down')), tied=True),
  'gemma': dict(stacks=(STACKS['pattern'],), tied=True, ends=spec.Ends(embed_scale=math.sqrt(D), softcap=5.)),
  'olmo': dict(stacks=(spec.Stack(num_layers=3, attention=NORMED, mlp=MLPS['dense'], block=spec.PostNorm()),)),
  'gpt': one(dataclasses.replace(ALONE, rope=None), spec.Plain(hidden=F, activation='gelu'), **OTHERS['plain']),
  'mixture': one(ATTENTIONS['grouped'], STACKS['shared'].mlp),
  'deepseek': dict(stacks=(spec.Stack(num_layers=1, attention=ATTENTIONS['latent'], mlp=spec.SwiGLU(hidden=F)),
                           spec.Stack(num_layers=2, attention=ATTENTIONS['latent'], mlp=GROUPS))),
}
# By size: what is left, where the model has it.
KINDS = {
  'width': dict(width=20), 'layers': dict(layers=2), 'heads': dict(heads=.5), 'kv_heads': dict(kv_heads=0.5),
  'hidden': dict(hidden=0.4), 'experts': dict(experts=0.75), 'expert_hidden': dict(expert_hidden=9),
}
HAS = {name: {'width', 'layers', 'heads', *more.split()} for name, more in (
  ('llama', 'kv_heads hidden'), ('biased', 'hidden kv_heads'), ('gemma', 'kv_heads hidden'), ('olmo', 'kv_heads hidden'),
  ('gpt', 'hidden'), ('mixture', 'kv_heads hidden experts expert_hidden'), ('deepseek', 'hidden experts expert_hidden'))}
CASES = [(name, kind) for name in FAMILIES for kind in KINDS if kind in HAS[name]]
ALL = {name: Shape(**shape) for name, shape in {
  'llama': dict(width=.5, layers=2, heads=2, kv_heads=1, hidden=12),
  'biased': dict(width=20, layers=2, heads=2, hidden=.5), 'gemma': dict(width=8, layers=2, kv_heads=1, hidden=.5),
  'olmo': dict(width=12, layers=1, kv_heads=1, heads=1), 'gpt': dict(layers=2, heads=.5, hidden=.5),
  'mixture': dict(width=20, layers=2, heads=.5, hidden=.5, experts=2, expert_hidden=.25),
  'deepseek': dict(width=.5, layers=2, heads=1, hidden=.5, experts=4, expert_hidden=12)}.items()}


def described_as(name: str) -> spec.Transformer:
  return spec.Transformer(**dict(vocab_size=V, dim=D) | FAMILIES[name])


@functools.cache
def model_of(name: str):
  """Numbers drawn by numpy, biases of selection among them; blocks of norms have scales."""
  return drawn(described_as(name))


def removal(model, shape: Shape, seed: int = 0) -> Removal:
  """With indices drawn by chance, other ones for each layer and expert."""
  rng, left = np.random.default_rng(seed), counts(model, shape)
  scores = {space: rng.normal(size=(*space.lead, space.size)) for space in left}
  return Removal(model, selection.chosen(model, left, scores))


# ------------------------------------------------------------------ the same with zeros

def without(index, lead, size: int) -> np.ndarray:
  """bool (*lead, size): what is not kept."""
  gone = np.ones((*lead, size), bool)
  np.put_along_axis(gone, np.asarray(index), False, axis=-1)
  return gone


def zeroed(array, dim: int, gone):
  """Zeros where `gone`, which has the dimensions in front and the last one at `dim`."""
  return jnp.where(np.reshape(gone, (*gone.shape[:-1], *[1] * (dim - gone.ndim + 1), gone.shape[-1], *[1] * (
    array.ndim - dim - 1))), 0, array)


def of_variables(model, chosen, change):
  """The model with change(path, array, axes) of the Variables that `chosen(path, axes)` names."""
  def visit(path, node):
    if not tree.is_variable(node): return node
    name, axes = tree.path_name(path), axes_of(node)
    return jax.tree.map(lambda a: change(name, a, axes), node) if chosen(name, axes) else node
  return jax.tree_util.tree_map_with_path(visit, model, is_leaf=tree.is_variable)


def masked(model, space, index):
  """The whole model with zeros where channels, heads or units are made: in what writes the residual stream; in what a layer
  asks of its heads or units at the end, and, where a norm would see the heads, where they begin. A layer adds zeros."""
  gone = without(index, space.lead, space.size)
  if space.kind == 'experts': return model   # see `without_experts`
  if space.kind == 'layers':
    apart = isinstance(model.stacks[int(space.owner.split('/')[1])], Unrolled)
    def change(path, array, axes):
      del axes
      gone_here = gone[int(path.split('/')[3])] if apart else gone.reshape(-1, *[1] * (array.ndim - 1))
      return jnp.where(gone_here, 0, array)
    writes = lambda path, axes: path.startswith(space.owner) and axes.endswith('D') and 'norm' not in path
    return of_variables(model, writes, change)
  if space.kind == 'width':
    writes = lambda path, axes: axes.endswith('D') and not path.endswith('norm/scale')   # norms may add to a channel
    return of_variables(model, writes, lambda path, array, axes: zeroed(array, array.ndim - 1, gone))
  names = {'hidden': ('down',), 'expert_hidden': ('down',), 'heads': ('query', 'output', 'query_nope'), 'kv_heads': ('key',)}
  inside = lambda path, axes: (path.startswith(f'{space.owner}/') and space.letter in axes and 'norm' not in path
                               and any(f'/{name}/' in path for name in names[space.kind]))
  return of_variables(model, inside, lambda path, array, axes: zeroed(
    array, array.ndim - len(axes) + axes.index(space.letter), gone))


@dataclasses.dataclass(unsafe_hash=True)
class Only:
  """A router that chooses among some experts only: the logits of all others are as low as can be."""
  inner: object
  kept: tuple

  causal = True

  @property
  def active(self): return self.inner.active

  def probs(self, logits_BTE): return self.inner.probs(logits_BTE)

  def __call__(self, logits_BTE, bias_E=None, real_BT=None):
    keep_E = jnp.isin(jnp.arange(logits_BTE.shape[-1]), jnp.asarray(self.kept))
    low = None if bias_E is None else jnp.where(keep_E, bias_E, -8)   # below all others, and sums of two keep their digits
    return self.inner(jnp.where(keep_E, logits_BTE, -1e9), low, real_BT)


def without_experts(model, kept):
  """Taken apart, so that each layer can have a router of its own."""
  found = {}
  for space, index in kept.items():
    if space.kind == 'experts': found[space.owner.split('/')[1]] = index
  model = unrolled(model)
  for number, index_LE in found.items():
    for i, block in enumerate(model.stacks[int(number)].blocks):
      block.mlp.route = Only(block.mlp.route, tuple(map(int, index_LE[i])))
  return model


def whole_with_zeros(model, made: Removal):
  for space, index in made.kept.items(): model = masked(model, space, index)
  return without_experts(model, made.kept) if any(space.kind == 'experts' for space in made.kept) else model


def check_the_same(name: str, shape: Shape):
  model = model_of(name)
  made = removal(model, shape)
  smaller = made(model)
  assert tree.size(smaller) < tree.size(model)
  assert_the_same(whole_with_zeros(model, made), smaller)


@pytest.mark.thinned
@pytest.mark.parametrize('name, kind', [case for case in CASES if case != ('gpt', 'width')], ids='-'.join)
def test_masking_one_dimension_and_removing_it_give_the_same(name, kind):
  """With the epsilon of norms in the order of float32 roundings of what they normalise."""
  check_the_same(name, Shape(**KINDS[kind]))


@pytest.mark.thinned
@pytest.mark.parametrize('name', FAMILIES)
def test_masking_all_dimensions_and_removing_them_give_the_same(name):
  check_the_same(name, ALL[name])


def test_a_norm_that_subtracts_means_sees_the_same_where_what_is_left_sums_to_zero():
  model = model_of('gpt')
  made = removal(model, Shape(width=20))
  (index,) = made.kept.values()
  writes = lambda path, axes: axes.endswith('D') and 'norm' not in path
  centred = of_variables(model, writes, lambda path, array, axes: array - jnp.mean(array[..., index], -1, keepdims=True))
  assert_the_same(whole_with_zeros(centred, made), made(centred))
  with pytest.raises(AssertionError): assert_the_same(whole_with_zeros(model, made), made(model))


# ------------------------------------------------------------------ what is left is an ordinary model

@pytest.mark.thinned
@pytest.mark.parametrize('name, kind', [*CASES, *((name, 'all') for name in FAMILIES)], ids='-'.join)
def test_what_is_left_is_described_as_the_smaller_shape(name, kind):
  shape, model = ALL[name] if kind == 'all' else Shape(**KINDS[kind]), shapes_of(name)
  smaller = removal(model, shape).shapes(model)
  assert described(smaller) == alike(shape.described(described_as(name)))
  assert jax.tree.structure(smaller) == jax.tree.structure(jax.eval_shape(
    lambda: shape.described(described_as(name)).build(rngs=nnx.Rngs(0))))


@pytest.mark.parametrize('name', ['gemma', 'mixture'])
def test_shapes_are_known_without_arrays(name):
  model = model_of(name)
  made = removal(model, ALL[name])
  assert_structure(made.shapes(model), made(model))
  assert_structure(jax.eval_shape(made, model), made(model))


@functools.cache
def shapes_of(name: str):
  return jax.eval_shape(lambda: described_as(name).build(rngs=nnx.Rngs(0)))


def test_each_layer_and_expert_keeps_indices_of_its_own():
  model = model_of('mixture')
  made = removal(model, Shape(hidden=.5, expert_hidden=.5, experts=3, heads=.5))
  for space, index in made.kept.items():
    assert index.shape[:-1] == space.lead and np.all(np.diff(index) > 0), space.kind
    assert len(np.unique(index.reshape(-1, index.shape[-1]), axis=0)) > 1, space.kind
  weights, left = (dict(tree.select(one, Weight)) for one in (model, made(model)))
  path = 'stacks/0/blocks/mlp/experts/up'
  kept = {space.kind: index for space, index in made.kept.items()}
  for layer in range(3):
    for place, expert in enumerate(kept['experts'][layer]):
      units = kept['expert_hidden'][layer, expert]
      np.testing.assert_array_equal(left[path].materialize()[layer, place],
                                    weights[path].materialize()[layer, expert][:, units])


def test_layers_apart_are_removed_one_by_one_and_stacks_that_lose_all_go():
  apart = unrolled(model_of('gemma'))
  made = removal(apart, Shape(layers=3))
  assert len(made(apart).stacks[0].blocks) == 3
  assert_the_same(whole_with_zeros(apart, made), made(apart))
  model = model_of('deepseek')
  smaller = removal(model, Shape(layers=1))(model)
  assert len(smaller.stacks) == 1 and isinstance(smaller.stacks[0].blocks.mlp, MoE)
  assert described(smaller) == alike(Shape(layers=1).described(described_as('deepseek')))


@pytest.mark.parametrize('name', ['llama', 'mixture'])
def test_eight_devices_make_what_one_makes(name, mesh):
  model = model_of(name)
  made = removal(model, Shape(width=16, hidden=.4, heads=2) if name == 'llama' else Shape(experts=2, expert_hidden=.5))
  with mesh(1, 2, 2, 2) as _:
    there = jax.device_put(model, shardings(model, jax.sharding.get_mesh()))
    smaller = dimensions.removed(there, made, jax.sharding.get_mesh())
    cut = [leaf for leaf in jax.tree.leaves(smaller) if not leaf.sharding.is_fully_replicated]
  assert cut
  for a, b in zip(jax.tree.leaves(smaller), jax.tree.leaves(made(model)), strict=True): np.testing.assert_array_equal(a, b)


# ------------------------------------------------------------------ what cannot be removed

@pytest.mark.parametrize('name, shape, message', [
  ('llama', dict(experts=2), 'experts: the model has none'),
  ('gpt', dict(expert_hidden=2), 'expert_hidden: the model has none'),
  ('deepseek', dict(kv_heads=1), 'kv_heads: the model has none'), ('llama', dict(width=33), 'width = 33: there are 32'),
  ('llama', dict(heads=3), 'heads = 3: 2 key-value heads, of 2 query heads each, must keep equally many'),
  ('llama', dict(heads=1), 'heads = 1: 2 key-value heads'),
  ('llama', dict(heads=4, kv_heads=1), 'heads = 4: 1 key-value heads'),
  ('biased', dict(heads=2, kv_heads=1), 'name heads alone'),
  ('mixture', dict(experts=1), 'experts = 1: router.top_k = 2 must be from 1 to num_experts = 1'),
  ('deepseek', dict(experts=5), 'experts = 5: the router has 4 groups of 2: keep a multiple of 4, .* or of 2, whole groups'),
  ('deepseek', dict(experts=1), 'experts = 1: the router has 4 groups'),
  ('gemma', dict(layers=3), r'layers = 3: layers go by whole repeats of a pattern of 2; Unroll\(\) frees them'),
], ids=str)
def test_what_a_model_does_not_have_is_refused_in_one_line(name, shape, message):
  for refuse in (lambda: counts(shapes_of(name), Shape(**shape)), lambda: Shape(**shape).described(described_as(name))):
    with pytest.raises(IncompatibleError, match=message) as caught: refuse()
    assert '\n' not in str(caught.value)


def test_whole_groups_of_a_router_go_where_groups_do_not_divide_what_stays():
  model = model_of('deepseek')
  smaller = removal(model, Shape(experts=6))(model)
  assert smaller.stacks[1].blocks.mlp.route == routing.SigmoidTopK(top_k=2, num_groups=3, top_groups=2, scale=2.5)
  check_the_same('deepseek', Shape(experts=6))


def test_weights_in_few_bits_and_patterns_are_refused_by_name():
  int8 = (Rule(weights=Int()),)
  stored, _ = Quantize(rules=int8)(model_of('llama'), Context())
  patterned, _ = PruneOnce(pattern=NofM())(model_of('llama'), Context())
  for model, shape, message in (
      (stored, Shape(hidden=8), 'stacks/0/blocks/mlp/down is stored as int8 per channel already'),
      (patterned, Shape(hidden=8), 'mlp/down has 2:4 along its inputs, which would not stay')):
    with pytest.raises(IncompatibleError, match=message): removal(model, shape)
  only_down, _ = Quantize(rules=(Rule(where='down', weights=Int()),))(model_of('llama'), Context())
  made = removal(only_down, Shape(heads=2))   # what has nothing to do with it may be in few bits
  assert tree.size(made(only_down)) < tree.size(only_down)


def test_zeros_are_promised_of_what_is_left():
  """Masks are cut as the arrays beneath them."""
  prune = PruneOnce(sparsity=.5, where=r'(query|down)$')
  model, _ = prune(model_of('mixture'), Context())
  made = removal(model, ALL['mixture'])
  smaller, before = made(model), invariants.read(model)
  followed, now = made.follow(before), invariants.read(smaller)
  assert followed.keys() == now.keys()
  for path, promised in followed.items():
    for a, b in zip(promised, now[path], strict=True):
      if a.kind == 'zeros': np.testing.assert_array_equal(a.keep, b.keep)
      else: assert a == b
  assert invariants.check(followed, smaller, prune) == []
  apart = unrolled(smaller)
  made = removal(apart, Shape(layers=1))
  assert made.follow(invariants.read(apart)).keys() == invariants.read(made(apart)).keys()


def test_every_array_of_a_layer_has_its_spaces():
  """No letter of a dimension that can be made smaller is in an array that no space names."""
  for name in FAMILIES:
    model, found = shapes_of(name), set()
    for space in spaces(model):
      for path, _ in tree.select(model, Weight): found |= {(path, space.letter)} if path in space.weights else set()
    missing = {(path, letter) for path, weight in tree.select(model, Weight) for letter in weight.axes
               if letter in 'DFNKE' and (path, letter) not in found and not path.endswith('gate_out')}
    assert not missing
    assert len(layers(model)) == sum(space.size * (2 if isinstance(stack, Repeated) else 1) for space, stack in zip(
      [space for space in spaces(model) if space.kind == 'layers'], model.stacks))
    assert all(isinstance(stack, (Stack, Repeated)) for stack in model.stacks)
