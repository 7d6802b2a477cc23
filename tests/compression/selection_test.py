"""What stays is what scores most: within groups, where heads and routers have any."""
import numpy as np

from efficient_lm.compression import selection
from efficient_lm.compression.dimensions import counts, spaces
from efficient_lm.compression.shape import Shape
from efficient_lm.models.moe.routing import SigmoidTopK, SoftmaxTopK
from tests.compressing import model_of


def test_the_best_stay_in_their_order():
  assert selection.best([3., 1., 2., 3.], 2).tolist() == [0, 3]
  assert selection.best([[1., 2., 3.], [3., 2., 1.]], 2).tolist() == [[1, 2], [0, 1]]
  assert selection.best(np.zeros(4), 2).tolist() == [0, 1]


def test_groups_keep_equally_many_or_go_as_a_whole():
  score = np.array([9., 8., 7., 0., 1., 0., 2., 3.])
  assert selection.of_router(SoftmaxTopK(top_k=1), score, 3).tolist() == [0, 1, 2]
  router = SigmoidTopK(top_k=1, num_groups=4, top_groups=1)
  assert selection.of_router(router, score, 4).tolist() == [0, 2, 4, 7]
  assert selection.of_router(router, score, 6).tolist() == [0, 1, 2, 3, 6, 7]
  assert selection.of_groups(score, 2, np.array([1]), 2).tolist() == [6, 7]


def test_a_head_group_is_worth_what_its_heads_are():
  """Four query heads in groups of two: {0, 1} and {2, 3}."""
  model, scores = model_of(), np.array([[5., 0., 3., 3.], [0., 1., 2., 0.]])
  def kept(**shape):
    left = counts(model, Shape(**shape))
    return {space.kind: index.tolist() for space, index in selection.chosen(
      model, left, {space: scores for space in left}).items()}
  assert kept(kv_heads=1) == {'heads': [[2, 3], [2, 3]], 'kv_heads': [[1], [1]]}
  assert kept(heads=2) == {'heads': [[0, 2], [1, 2]]}
  assert kept(heads=1, kv_heads=1) == {'heads': [[2], [2]], 'kv_heads': [[1], [1]]}


def test_without_scores_the_first_stay():
  model = model_of(mlp='experts')
  left = counts(model, Shape(experts=2, expert_hidden=3, width=5))
  for space, index in selection.chosen(model, left, selection.unscored(left)).items():
    np.testing.assert_array_equal(index, np.broadcast_to(np.arange(left[space]), (*space.lead, left[space])))
  assert {space.kind for space in spaces(model)} > {space.kind for space in left}
