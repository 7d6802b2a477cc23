"""Scores are what their papers say, computed plainly; and what is of no use scores least."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_lm import tree
from efficient_lm.compression import calibration, group_scores, importance, scores
from efficient_lm.compression.dimensions import spaces
from efficient_lm.compression.shape import SIZES
from efficient_lm.errors import IncompatibleError
from efficient_lm.models.transformer import unrolled
from efficient_lm.parallel.sharding import place, shardings
from efficient_lm.weights.weight import Weight
from tests.compressing import batch_of, family, model_of

pytestmark = pytest.mark.usefixtures('quick_compilation')

ALL = (scores.Random(), scores.Magnitude(), group_scores.Activations(), scores.Taylor(), group_scores.BlockInfluence(),
       group_scores.Frequency(), group_scores.Reap(), group_scores.Reconstruction())


def batches(): return [batch_of(seed, rows=4) for seed in range(2)]


@functools.cache
def scored(score, mlp: str = 'experts'):
  """By kind, of the only module of that kind (of experts: not the shared one)."""
  model = model_of(mlp=mlp)
  chosen = [space for space in spaces(model) if space.kind in score.kinds and space.kind != 'kv_heads']
  found = score.score(model, chosen, batches(), jax.random.key(0))
  assert set(found) == set(chosen)
  for space, value in found.items(): assert value.shape == (*space.lead, space.size) and np.isfinite(value).all()
  return {space.kind: found[space] for space in chosen}


@pytest.mark.parametrize('score', ALL, ids=lambda score: type(score).__name__)
def test_every_index_of_every_kind_has_a_score(score):
  found = scored(score)
  assert set(found) == set(score.kinds) - {'kv_heads'} <= set(SIZES)
  for value in found.values(): assert (value >= 0).all() and len(np.unique(value)) > 1


def test_magnitude_is_the_norm_of_what_would_be_removed():
  model = model_of()
  weights = {path.removeprefix('stacks/0/blocks/'): np.asarray(weight.materialize())
             for path, weight in tree.select(model, Weight)}
  found = scored(scores.Magnitude(), 'dense')
  unit = [weights['mlp/gate'][1, :, 3], weights['mlp/up'][1, :, 3], weights['mlp/down'][1, 3]]
  head = [weights['attention/query'][0, :, 2], weights['attention/output'][0, 2]]
  norm = lambda parts: np.sqrt(sum((part ** 2).sum() for part in parts))
  np.testing.assert_allclose(found['hidden'][1, 3], norm(unit), rtol=1e-5)
  np.testing.assert_allclose(found['heads'][0, 2], norm(head), rtol=1e-5)
  layer = [array[1] for path, array in weights.items() if path.startswith(('attention', 'mlp'))]
  np.testing.assert_allclose(found['layers'][1], norm(layer), rtol=1e-5)


def test_taylor_is_the_slope_of_the_loss_along_what_would_be_zero():
  """d loss / d t at 1 of the model whose hidden unit, or expert, or layer, writes t times what it does."""
  model, layer = model_of(mlp='experts'), 'stacks/0/blocks'
  places = [(f'{layer}/mlp/shared/down', (1, 3), 0), (f'{layer}/mlp/experts/down', (0, 2), 1),
            *((f'{layer}/{path}', (1,), 2) for path in ('attention/output', 'mlp/experts/down', 'mlp/shared/down'))]
  @jax.jit
  def slopes(t_3, batch):
    def loss(t_3):
      def change(name, weight):
        for path, at, which in places:
          if name == path: weight = weight.replaced(weight.materialize().at[at].multiply(t_3[which]))
        return weight
      return importance.loss(tree.rewrite(model, Weight, change), batch)
    return jax.grad(loss)(t_3)
  wanted, found = sum(np.abs(slopes(jnp.ones(3), batch)) for batch in batches()), scored(scores.Taylor())
  np.testing.assert_allclose([found['hidden'][1, 3], found['experts'][0, 2], found['layers'][1]], wanted, rtol=1e-3)


def test_influence_is_how_far_a_layer_turns_the_stream():
  model, before, after = model_of(), [], []
  hidden = [calibration.embedded(model, batch) for batch in batches()]
  layer = model.stacks[0].layer(0)
  for one in hidden:
    before.append(np.asarray(one.x_BTD, np.float64))
    after.append(np.asarray(layer(one.x_BTD, one.positions_BT, one.segments_BT)[0], np.float64))
  a, b = np.concatenate(before), np.concatenate(after)
  cosine = (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
  np.testing.assert_allclose(scored(group_scores.BlockInfluence(), 'dense')['layers'][0], np.mean(1 - cosine), rtol=1e-4)
  pattern = family('pattern')
  space = next(space for space in spaces(pattern) if space.kind == 'layers')
  assert group_scores.BlockInfluence().score(pattern, [space], batches(), None)[space].shape == (2,)


def mixture_given():
  """The first mixture, and what it is given: (M, D)."""
  model = model_of(mlp='experts')
  layer = model.stacks[0].layer(0)
  given = importance.mixture_inputs(layer, [calibration.embedded(model, batch) for batch in batches()])
  return layer.mlp, jnp.concatenate([one.x_BTD for one in given])


def test_experts_are_scored_as_all_of_them_computed_densely_say():
  mixture, x_BTD = mixture_given()
  gate_BTE = np.asarray(mixture.routing(x_BTD).dense_gates(4))
  norm_BTE = np.linalg.norm(np.asarray(mixture.experts.all(x_BTD), np.float64), axis=-1)
  rows_E = (gate_BTE > 0).sum((0, 1))
  np.testing.assert_array_equal(scored(group_scores.Frequency())['experts'][0], rows_E)
  np.testing.assert_allclose(scored(group_scores.Reap())['experts'][0],
                             (gate_BTE * norm_BTE).sum((0, 1)) / np.maximum(rows_E, 1), rtol=1e-4)


def test_the_error_without_an_expert_is_that_of_the_layer_that_lacks_it():
  mixture, x_BTD = mixture_given()
  whole = mixture.oracle(x_BTD)
  for e in range(4):
    left = jax.tree.map(lambda leaf: leaf, mixture)
    rest = np.array([i for i in range(4) if i != e])
    left.router = left.router.replaced(left.router.materialize()[:, rest])
    for name in ('gate', 'up', 'down'):
      setattr(left.experts, name, getattr(left.experts, name).replaced(getattr(left.experts, name).materialize()[rest]))
    left.num_experts = 3
    error = float(jnp.sum((left.oracle(x_BTD) - whole) ** 2))
    np.testing.assert_allclose(scored(group_scores.Reconstruction())['experts'][0, e], error, rtol=1e-3)


@pytest.mark.parametrize('kind', ['dense', 'experts'])
def test_what_is_not_used_scores_least(kind):
  """A unit whose `down` is zero, an expert and a head that write nothing, a channel that nobody writes or reads."""
  model = model_of(mlp=kind)
  zero = {'attention/output': (slice(None), 1), **({'mlp/down': (slice(None), 5)} if kind == 'dense' else {
    'mlp/experts/down': (slice(None), 3)})}
  def change(path, weight):
    at = zero.get(path.removeprefix('stacks/0/blocks/'))
    return weight if at is None else weight.replaced(weight.materialize().at[at].set(0))
  model = tree.rewrite(model, Weight, change)
  of = {space.kind: space for space in spaces(model)}
  for score in (scores.Taylor(), *([group_scores.Reap()] if kind == 'experts' else [])):
    for name, at in (('heads', 1), ('hidden', 5) if kind == 'dense' else ('experts', 3)):
      if name not in score.kinds: continue
      found = score.score(model, [of[name]], batches(), None)[of[name]]
      assert (found.argmin(-1) == at).all() and np.allclose(found[..., at], 0, atol=1e-6)


def test_layers_apart_score_as_those_of_a_stack():
  model = model_of()
  apart = unrolled(model)
  for score in (scores.Magnitude(), group_scores.Activations(), scores.Taylor()):
    whole, each = (score.score(one, [space for space in spaces(one) if space.kind in ('hidden', 'width')], batches(), None)
                   for one in (model, apart))
    by_kind = lambda found, kind: np.concatenate([value.reshape(-1) for space, value in found.items() if space.kind == kind])
    for kind in ('hidden', 'width'): np.testing.assert_allclose(by_kind(whole, kind), by_kind(each, kind), rtol=1e-3)


@pytest.mark.parametrize('score', [group_scores.Activations(), group_scores.Reap()], ids=lambda score: type(score).__name__)
def test_eight_devices_score_as_one(score, mesh):
  model = model_of(mlp='experts')
  chosen = [space for space in spaces(model) if space.kind in score.kinds and space.kind != 'kv_heads']
  with mesh(1, 2, 2, 2) as _:
    devices = jax.sharding.get_mesh()
    there = jax.device_put(model, shardings(model, devices))
    found = score.score(there, chosen, [place(batch, devices) for batch in batches()], None)
  for space in chosen: np.testing.assert_allclose(found[space], scored(score)[space.kind], rtol=1e-4, err_msg=space.kind)


def test_no_text_is_one_line():
  model = model_of(mlp='experts')
  for score in ALL:
    if not score.calibrated: continue
    chosen = [space for space in spaces(model) if space.kind in score.kinds and space.kind != 'kv_heads']
    with pytest.raises(IncompatibleError, match='calibration has no data'): score.score(model, chosen, [], None)
