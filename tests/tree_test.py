"""Paths have one spelling; a rewrite reaches what its selector names, and says so when that is nothing."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_lm import tree
from efficient_lm.formats import Int
from efficient_lm.models import spec
from efficient_lm.weights.fake_quantized import FakeQuantized
from efficient_lm.weights.quantizers import Rounding
from efficient_lm.weights.weight import Dense, Weight


@pytest.fixture(scope='module')
def model():
  stack = spec.Stack(num_layers=2, attention=spec.GroupedQuery(num_heads=2, num_kv_heads=1, head_dim=4),
                     mlp=spec.SwiGLU(hidden=8))
  described = spec.Transformer(vocab_size=16, dim=8, stacks=(stack, stack))
  abstract = jax.eval_shape(lambda: described.build(rngs=nnx.Rngs(0)))
  return jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), abstract)


def test_a_module_and_its_state_have_the_same_paths(model):
  names = lambda nodes: [tree.path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(nodes)]
  plain = lambda name: name.removesuffix('/value').removesuffix('/raw_value')
  assert sorted(map(plain, names(model))) == sorted(map(plain, names(nnx.state(model))))


def test_select_finds_each_weight_once_at_its_outermost(model):
  wrapped = tree.rewrite(model, Weight, lambda _, weight: FakeQuantized(weight, Rounding(Int(bits=4))))
  paths = [path for path, _ in tree.select(model, Weight)]
  assert len(set(paths)) == len(paths) == 2 + 2 * (4 + 3)   # embed, head; four of attention, three of the mlp, a stack
  assert [path for path, _ in tree.select(wrapped, Weight)] == paths
  assert [path for path, _ in tree.select(wrapped, Dense)] == [f'{path}/inner' for path in paths]


@pytest.mark.parametrize('where, count', [('', 16), ('mlp/', 6), ('^stacks/1/', 7), ('(gate|up)$', 4), ('nowhere', 0)])
def test_select_filters_by_regular_expression(model, where, count):
  assert len(list(tree.select(model, Weight, where))) == count


def test_rewrite_by_the_identity_changes_nothing(model):
  same = tree.rewrite(model, Weight, lambda _, weight: weight)
  assert jax.tree.structure(same) == jax.tree.structure(model)
  assert all(a is b for a, b in zip(jax.tree.leaves(same), jax.tree.leaves(model), strict=True))


def test_rewrite_changes_what_it_selects_and_nothing_else(model):
  changed = tree.rewrite(model, Weight, lambda _, weight: jax.tree.map(np.zeros_like, weight), 'mlp/up')
  before, after = dict(tree.select(model, Weight)), dict(tree.select(changed, Weight))
  assert before.keys() == after.keys()
  for path in before:
    old, new = before[path].materialize(), after[path].materialize()
    if path.endswith('mlp/up'): np.testing.assert_array_equal(new, np.zeros_like(old))
    else: assert new is old


def test_rewrite_hands_over_the_path_that_select_names(model):
  seen = []
  tree.rewrite(model, Weight, lambda path, weight: seen.append(path) or weight, 'attention')
  assert seen == [path for path, _ in tree.select(model, Weight, 'attention')]


def test_a_rewrite_that_finds_nothing_names_what_there_is(model):
  with pytest.raises(ValueError, match=r"no Weight on a path that matches 'mpl'; the paths are embed, own_head, stacks/0/"):
    tree.rewrite(model, Weight, lambda _, weight: weight, 'mpl')
  with pytest.raises(ValueError, match='the tree has none at all'):
    tree.rewrite({'a': jnp.ones(3)}, Weight, lambda _, weight: weight)


def test_size_and_bytes_of_arrays_and_of_shapes():
  arrays = {'a': jnp.zeros((3, 5)), 'b': jnp.zeros(4, jnp.bfloat16), 'c': None, 'd': jnp.zeros((), jnp.int8)}
  assert tree.size(arrays) == 15 + 4 + 1
  assert tree.num_bytes(arrays) == 15 * 4 + 4 * 2 + 1
  shapes = jax.eval_shape(lambda: arrays)
  assert (tree.size(shapes), tree.num_bytes(shapes)) == (tree.size(arrays), tree.num_bytes(arrays))
