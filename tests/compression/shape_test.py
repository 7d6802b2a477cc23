"""Sizes as a config says them: shares and counts, of descriptions (of models: dimensions_test)."""
import dataclasses

import pytest

from efficient_lm.compression.shape import Shape, is_share, router_of
from efficient_lm.errors import IncompatibleError
from efficient_lm.models import spec, zoo
from efficient_lm.models.moe.routing import SigmoidTopK, Skipping, SoftmaxTopK


def test_a_share_is_of_what_is_there_and_a_whole_number_counts():
  assert is_share(1.0) and is_share(0.5) and not is_share(1) and not is_share(2.0)
  assert Shape(width=1).size('width', 9) == 1 and Shape(width=1.0).size('width', 9) == 9
  assert Shape(width=6.0).size('width', 9) == 6, 'as a command line gives it'
  assert Shape(width=0.75).size('width', 9) == 7 and Shape(width=0.75, multiple=4).size('width', 9) == 8
  assert Shape(width=0.01).size('width', 9) == 1 and Shape(hidden=0.5).size('width', 9) == 9
  assert Shape(layers=0.5, multiple=4).size('layers', 6) == 3, 'only channels and units have multiples'


@pytest.mark.parametrize('shape, names', [
  (Shape(width=0), ['width']), (Shape(layers=-1), ['layers']), (Shape(heads=1.5), ['heads']),
  (Shape(hidden=0.0), ['hidden']), (Shape(multiple=0), ['multiple']), (Shape(experts=2, width=0.5), [])], ids=str)
def test_a_wrong_size_is_named(shape, names):
  assert [name for name, _, _ in shape.check()] == names


def test_stacks_give_up_equal_shares_and_patterns_whole_repeats():
  assert Shape(layers=8).of_stacks([4, 12], [1, 1]) == [2, 6]
  assert Shape(layers=5).of_stacks([4, 12], [1, 1]) == [1, 4]
  assert Shape(layers=0.5).of_stacks([12], [6]) == [6]
  assert Shape().of_stacks([3, 4], [1, 2]) == [3, 4]
  with pytest.raises(IncompatibleError, match='whole repeats of a pattern of 6'): Shape(layers=7).of_stacks([12], [6])


def test_heads_are_left_that_groups_can_share():
  assert Shape(heads=0.5).of_heads(8, 2) == (4, 2) and Shape(kv_heads=1).of_heads(8, 2) == (4, 1)
  assert Shape(heads=0.5, kv_heads=1).of_heads(8, 2) == (2, 1) and Shape(heads=3).of_heads(8, 8) == (3, 3)
  assert Shape().of_heads(8, 2) == (8, 2)


def test_the_baseline_of_a_shape_is_described_by_it():
  smaller = Shape(width=0.5, layers=2, heads=0.5, hidden=64).described(zoo.tiny())
  stack = smaller.stacks[0]
  assert (smaller.dim, stack.num_layers, stack.attention.num_heads, stack.attention.num_kv_heads, stack.mlp.hidden) == (
    64, 2, 2, 2, 64)
  assert Shape(width=1.0).described(zoo.tiny()) == zoo.tiny()
  mixture = Shape(expert_hidden=32, hidden=0.5).described(zoo.tiny(zoo.experts(4, 2, 64, num_shared=2))).stacks[0].mlp
  assert (mixture.hidden, mixture.num_shared, mixture.shared) == (32, 2, None)
  mixture = Shape(expert_hidden=48).described(zoo.tiny(zoo.experts(4, 2, 64, num_shared=2))).stacks[0].mlp
  assert mixture.num_shared == 0 and mixture.shared == spec.SwiGLU(hidden=128), 'shared experts as wide as they were'


def test_a_router_keeps_what_its_groups_allow():
  router = SigmoidTopK(top_k=3, num_groups=4, top_groups=2)
  assert router_of(router, 16, 8) == router
  assert router_of(router, 16, 12) == router, 'equally many of each group, where that divides'
  three = dataclasses.replace(router, num_groups=3, top_groups=3)
  assert router_of(three, 12, 8) == dataclasses.replace(router, num_groups=2)
  assert router_of(Skipping(inner=router, beta=.5), 16, 8) == Skipping(inner=router, beta=.5)
  with pytest.raises(IncompatibleError, match=r'router\.top_groups = 2 leaves a token 2 experts, fewer than top_k = 3'):
    router_of(router, 16, 4)
  with pytest.raises(IncompatibleError, match=r'experts = 1: router\.top_k = 2 must be'):
    router_of(SoftmaxTopK(top_k=2), 4, 1)


def test_shapes_are_values():
  assert Shape(width=2) == Shape(width=2) and hash(Shape(width=2)) == hash(Shape(width=2))
  assert Shape(width=0.5, layers=3).text == 'width=0.5, layers=3'
  assert dataclasses.replace(Shape(width=2), width=None).asked == ()
