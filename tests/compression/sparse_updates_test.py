"""An optimizer under which masks hold and move: by hand on small matrices, and whatever optimizer it wraps."""
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from efficient_lm.compression import masks, sparse_updates
from efficient_lm.compression.patterns import Blocks, PerMatrix
from efficient_lm.compression.sparse_updates import Groups, Moment
from efficient_lm.techniques import (
  SET,
  AcDc,
  NofM,
  Periodic,
  Prune,
  PruneOnce,
  Random,
  RigL,
  Saliency,
  SparseTraining,
  StaticMask,
  StraightThroughMask,
)
from efficient_lm.training import moments
from efficient_lm.training.learner import Learner
from efficient_lm.training.optimizers import AdamW, Muon
from efficient_lm.tree import path_name
from efficient_lm.weights.layout import Layout
from efficient_lm.weights.weight import Dense

pytestmark = pytest.mark.usefixtures('quick_compilation')


def draw(*shape, seed=0):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def model_of(size=8):
  """One weight that is pruned, two that are not: the path of one ends with that of the first."""
  other = {'w': Dense(draw(size, size, seed=1), 'DF', 'D')}
  return {'w': Dense(draw(2, size, size), 'DF', 'D'), 'other': other, 'bias': None}


class Training:
  """What a technique makes of an optimizer, step by step with random gradients."""

  def __init__(self, technique, optimizer, model=None, steps=100):
    made = technique(Learner(model or model_of(), None, optimizer, steps=steps), jax.random.key(3))
    self.graph, self.params, self.rest = nnx.split(made.model, nnx.Param, ...)
    self.optimizer, self.state, self.count = made.optimizer, made.optimizer.init(self.params), 0
    self.jitted = jax.jit(made.optimizer.update)

  def step(self, grads=None):
    self.count += 1
    grads = grads or jax.tree.map(lambda p: draw(*p.shape, seed=self.count + 10), self.params)
    updates, self.state = self.jitted(grads, self.state, self.params)
    self.params = optax.apply_updates(self.params, updates)
    return grads

  @property
  def model(self): return nnx.merge(self.graph, self.params, self.rest)

  @property
  def w(self): return np.asarray(self.model['w'].materialize())

  @property
  def keep(self): return np.asarray(jax.tree.leaves(self.state.keep)[0])


# ------------------------------------------------------------------ exchanging, by brute force

def by_hand(keep, values, growth, share):
  """Of one matrix: the definition, by sorting."""
  live = np.flatnonzero(keep)
  count = int(np.floor(np.float32(share) * len(live)))
  stays = set(live) - set(live[np.argsort(np.abs(values.reshape(-1)[live]), kind='stable')[:count]])
  others = [i for i in np.argsort(-growth.reshape(-1), kind='stable') if i not in stays]
  made = np.zeros(keep.size, bool)
  made[[*stays, *others[:count]]] = True
  return made.reshape(keep.shape)


exchange = jax.jit(lambda keep, values, growth, share: sparse_updates.exchanged(
  Moment(Groups(PerMatrix(), Layout('EDF', 'D', ()), 0.5), 1, keep, values), share, growth))


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 2 ** 16), st.floats(0, 1, width=32), st.sampled_from([0.1, 0.5, 0.9]))
def test_those_of_the_smallest_magnitude_go_and_those_of_the_largest_gradient_come(seed, share, density):
  rng = np.random.default_rng(seed)
  keep = rng.random((2, 3, 6, 5)) < density   # layers and experts
  values, growth = rng.normal(size=(2, *keep.shape)).astype(np.float32)
  growth = np.abs(growth)
  got = np.asarray(exchange(keep, np.where(keep, values, 0), growth, share))
  for i in np.ndindex(2, 3): np.testing.assert_array_equal(got[i], by_hand(keep[i], values[i], growth[i], share))


def test_blocks_are_exchanged_as_one():
  pattern, weight = Blocks(outputs=2, inputs=4), Dense(draw(8, 8), 'DF', 'D')
  values, growth, layout = weight.materialize(), jnp.abs(draw(8, 8, seed=1)), Layout.of(weight)
  live = np.zeros((4, 2), bool)
  live[[0, 1, 3], [0, 1, 1]] = True
  keep = Groups(pattern, layout, 0.5).spread(jnp.asarray(live).reshape(1, -1), jnp.zeros((8, 8)))
  got = sparse_updates.exchanged(Moment(Groups(pattern, layout, 0.5), 1, keep, values), 0.4, growth)
  units = lambda array: np.asarray(Groups(pattern, layout, 0.5).candidates(array)).reshape(4, 2)
  expected = by_hand(live, units(jnp.abs(values)), units(growth), 0.4)
  np.testing.assert_array_equal(units(got.astype(jnp.float32)), np.where(expected, 8, 0))


def test_a_step_of_rigl_is_adam_on_live_weights_then_an_exchange():
  """All of it against numpy: what comes back is zero, with moments of zero, and moves from the next step on."""
  made = Training(SparseTraining(sparsity=0.75, method=RigL(share=0.5, every=3, end=90), where='^w$'), optax.adam(0.1))
  w, keep = made.w.astype(np.float64), made.w != 0
  assert np.all(keep.sum((-2, -1)) == 16) and np.array_equal(keep, made.keep)
  m, v = np.zeros_like(w), np.zeros_like(w)
  for step in range(1, 8):
    gradient = np.asarray(dict(flat(made.step()))['w/array'])
    seen = np.where(keep, gradient, 0)
    m, v = 0.9 * m + 0.1 * seen, 0.999 * v + 0.001 * seen ** 2
    moved = np.where(keep, w - 0.1 * (m / (1 - 0.9 ** step)) / (np.sqrt(v / (1 - 0.999 ** step)) + 1e-8), 0)
    new = keep
    if step % 3 == 0:
      share = 0.25 * (1 + np.cos(np.pi * step / 90))
      new = np.stack([by_hand(keep[i], moved[i], np.abs(gradient[i]), share) for i in range(2)])
      grown = new & ~keep
      assert grown.any()
      m, v = np.where(grown, 0, m), np.where(grown, 0, v)
    w, keep = np.where(new & keep, moved, 0), new
    np.testing.assert_array_equal(made.keep, keep)
    np.testing.assert_allclose(made.w, w, rtol=1e-4, atol=1e-6)   # seven steps in float32
    np.testing.assert_array_equal(made.w[~keep], 0)
    adam = made.state.inner[0]
    for mine, expected in ((adam.mu, m), (adam.nu, v)):
      found = np.asarray(dict(flat(mine))['w/array'])
      np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-7)
      if step % 3 == 0: np.testing.assert_array_equal(found[grown], 0)
    if step % 3 == 0: np.testing.assert_array_equal(made.w[grown], 0)


def flat(tree):
  """(path, array) of variables."""
  for path, node in jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda node: hasattr(node, 'get_metadata')):
    for leaf in jax.tree.leaves(node): yield path_name(path), leaf


# ------------------------------------------------------------------ whatever optimizer

def odd():
  """States that no library has: a lone number, a matrix of another shape, a tuple of copies of the parameters."""
  init = lambda params: {'lone': jnp.ones(()), 'rows': jax.tree.map(lambda p: jnp.ones(p.shape[:-1]), params),
                         'copies': (jax.tree.map(lambda p: p + 1, params),)}
  return optax.GradientTransformation(init, lambda grads, state, params=None: (
    jax.tree.map(lambda g: -0.1 * g, grads), jax.tree.map(lambda leaf: leaf * 2, state)))


# How many arrays of its state belong to single weights.
OPTIMIZERS = {
  'adamw': (AdamW(), 2), 'eight bits': (AdamW(state_bits=8), 2), 'muon': (Muon(), 1), 'sgd': (optax.sgd(0.1), 0),
  'momentum': (optax.sgd(0.1, momentum=0.9), 1), 'adagrad': (optax.adagrad(0.1), 1), 'lion': (optax.lion(0.1), 1),
  'adafactor, factored': (optax.adafactor(0.1, min_dim_size_to_factor=8), 0), 'adafactor': (optax.adafactor(0.1), 1),
  'schedule-free': (optax.contrib.schedule_free_adamw(0.1), 2), 'odd': (odd(), 1),
  'two by label': (optax.multi_transform({'a': optax.adam(0.1), 'b': optax.sgd(0.1)},
                                         lambda params: jax.tree.map(lambda _: 'a', params)), 2),
  'every third': (optax.MultiSteps(optax.adam(0.1), 3).gradient_transformation(), 3),
}


@pytest.mark.thinned
@pytest.mark.parametrize('name', OPTIMIZERS)
def test_what_comes_back_has_the_state_of_a_first_step_in_any_optimizer(name):
  optimizer, number = OPTIMIZERS[name]
  if hasattr(optimizer, 'build'): optimizer = optimizer.build(100)
  made = Training(SparseTraining(sparsity=0.5, method=RigL(share=0.5, every=2), where='^w$'), optimizer, model_of(64))
  made.step()
  before, fresh = made.keep, optimizer.init(made.params)
  made.step()
  grown = made.keep & ~before
  assert grown.sum() >= 2 * 400 and np.all(made.keep.sum((-2, -1)) == 2048)
  states = [dict(flat(state)) for state in (made.state.inner, fresh)]
  assert list(states[0]) == list(states[1])
  own = [path for path in states[0] if states[0][path].shape == grown.shape]
  assert len(own) == number, own
  for path in own: np.testing.assert_array_equal(states[0][path][grown], states[1][path][grown], err_msg=path)
  live = before & made.keep
  changed = [np.mean(np.asarray(states[0][path] != states[1][path])[live]) for path in own]
  assert not own or max(changed) > 0.9, 'what was there before has its state'
  if name == 'eight bits':
    for codes, scale in ((own[0], own[0].replace('codes', 'scale')), (own[1], own[1].replace('codes', 'scale'))):
      values = moments.expand(states[0][codes], states[0][scale], moments.block_shape(grown.shape, 'DF'))
      # Zero, or the least that there is: 1e-8 of a scale, which is 1.004 times the largest number of its block.
      assert np.all(np.abs(values[grown]) <= 1.004e-8 * np.max(np.abs(values)))


# ------------------------------------------------------------------ every method, by what it promises

METHODS = {
  'prune': Prune(sparsity=0.75, start=0, end=6, every=2, where='^w$'),
  'prune at random': Prune(sparsity=0.75, start=0, end=6, every=2, where='^w$', score=Random()),
  'prune by saliency': Prune(sparsity=0.75, start=0, end=6, every=2, where='^w$', score=Saliency()),
  'static': StaticMask(), 'rigl': RigL(every=2, end=6), 'set': SET(every=2, end=6),
  'ac/dc': AcDc(start=2, every=2, end=6), 'straight-through': StraightThroughMask(start=0, end=6, every=2)}
PATTERNS = {'single': PerMatrix(), 'blocks': Blocks(outputs=2, inputs=4), '1:4': NofM(n=1, m=4)}
CASES = [(method, pattern) for method in METHODS for pattern in PATTERNS
         if not (pattern == '1:4' and method in ('rigl', 'set'))]


def technique_of(method, pattern):
  made = METHODS[method]
  if isinstance(made, Prune): return type(made)(**vars(made) | dict(pattern=PATTERNS[pattern]))
  return SparseTraining(sparsity=0.75, method=made, pattern=PATTERNS[pattern], where='^w$')


def zeros_expected(method, step):
  """Of the 64 weights of each matrix, or of its 8 blocks as weights; None where it is in the midst of things."""
  if method.startswith('prune'): return 48 if step >= 6 else None
  if method == 'ac/dc': return 48 if step in (2, 3) or step >= 6 else 0
  if method == 'straight-through': return 48 if step >= 2 else 0
  return 48


@pytest.mark.thinned
@pytest.mark.parametrize('method, pattern', CASES)
def test_after_every_update_as_much_of_each_matrix_is_zero_as_was_said(method, pattern):
  made = Training(technique_of(method, pattern), optax.adam(0.1))
  for step in range(9):
    if step: made.step()
    zeros = (made.w == 0).sum((-2, -1))
    if (expected := zeros_expected(method, step)) is not None:
      # What comes back begins at zero: it is not masked, and moves in the next step.
      come = made.keep & (made.w == 0)
      np.testing.assert_array_equal(zeros - come.sum((-2, -1)), expected)
    np.testing.assert_array_equal(made.w[~made.keep], 0)
    if pattern == '1:4' and (~made.keep).sum() >= 96:
      assert np.all((np.swapaxes(made.keep, -1, -2).reshape(-1, 4)).sum(-1) <= 1), 'along the inputs D of DF'
    if pattern == 'blocks':
      blocks = np.swapaxes(made.keep, -1, -2).reshape(2, 4, 2, 2, 4)
      assert np.all(blocks == blocks[:, :, :1, :, :1])
  left = masks.masked(made.model, made.state)
  np.testing.assert_array_equal(left['w'].materialize(), made.w)
  assert (pattern == '1:4') == (left['w'].pattern is not None)
  assert all(one.held_by(left['w']) for one in left['w'].invariants())
  assert np.all(np.asarray(left['other']['w'].materialize()) != 0)


def test_dense_phases_change_what_was_masked():
  made = Training(technique_of('ac/dc', 'single'), optax.adam(1.))   # fast enough to come back within two steps
  kept = []
  for _ in range(7): made.step(); kept.append(made.keep)
  assert kept[0].all() and kept[3].all() and not kept[1].all(), 'dense, sparse, dense'
  assert np.any(kept[5] & ~kept[1]), 'what was masked in one sparse phase may live in the next'


def test_straight_through_is_the_optimizer_on_dense_weights():
  """They are what the optimizer alone makes of the same gradients; the model is a masked copy of them."""
  made = Training(SparseTraining(sparsity=0.5, method=StraightThroughMask(start=0, end=6, every=2), where='^w$'),
                  optax.adam(0.1))
  alone, params = optax.adam(0.1), nnx.split(model_of(), nnx.Param, ...)[1]
  state, update = alone.init(params), jax.jit(alone.update)
  for step in range(1, 9):
    grads = made.step()
    updates, state = update(jax.tree.unflatten(jax.tree.structure(params), jax.tree.leaves(grads)), state, params)
    params = optax.apply_updates(params, updates)
    dense = np.asarray(dict(flat(params))['w/array'])
    hidden = np.asarray(dict(flat(made.state.inner.dense))['w/array'])
    np.testing.assert_allclose(hidden, dense, rtol=1e-6, atol=1e-7)   # another program, the same float32 sums
    np.testing.assert_array_equal(made.w, np.where(made.keep, hidden, 0))
    if step in (2, 4, 6):
      size = np.sort(np.abs(hidden).reshape(2, -1), -1)
      np.testing.assert_array_equal(made.keep, np.abs(hidden) >= size[:, 32, None, None])
  assert (made.keep.sum((-2, -1)) == 32).all()


def test_a_state_keeps_its_dtypes_for_weights_of_16_bits():
  start = {'w': Dense(draw(8, 8).astype(jnp.bfloat16), 'DF', 'D')}
  made = Training(SparseTraining(sparsity=0.5, method=METHODS['straight-through'], where='^w$'), optax.sgd(0.1), start)
  dtypes = lambda: [leaf.dtype for leaf in jax.tree.leaves((made.params, made.state))]
  before = dtypes()
  for _ in range(3): made.step(jax.tree.map(lambda p: draw(*p.shape), made.params))   # float32 gradients, so updates
  assert dtypes() == before and (made.w == 0).sum() == 32


def test_the_first_mask_and_those_that_follow_differ_from_matrix_to_matrix():
  made = Training(SparseTraining(sparsity=0.5, method=SET(every=1, end=9), where='^w$'), optax.adam(0.1))
  seen = [made.keep]
  for _ in range(3): made.step(); seen.append(made.keep)
  assert all(np.any(mask[0] != mask[1]) for mask in seen)
  assert all(np.any(a != b) for a, b in itertools.pairwise(seen))


def test_a_static_mask_is_that_of_its_score_and_its_zeros_count_an_earlier_ones():
  before, _ = PruneOnce(sparsity=0.25, where='^w$')(model_of(), None)
  made = Training(SparseTraining(sparsity=0.5, method=StaticMask(), where='^w$'), optax.adam(0.1), before)
  for _ in range(2): made.step()
  assert ((made.w == 0).sum((-2, -1)) == 32).all()
  np.testing.assert_array_equal(made.w[np.asarray(before['w'].materialize()) == 0], 0)


def test_periodic_and_at_once_are_what_they_say_under_prune():
  made = Training(Prune(sparsity=0.5, start=0, end=6, every=2, where='^w$', schedule=Periodic()), optax.adam(0.1))
  for step in range(1, 8):
    made.step()
    assert ((made.w == 0).sum((-2, -1)) == (32 if step >= 2 else 0)).all()


@pytest.mark.parametrize('method', [RigL(share=0., every=2), SET(share=0., every=2)])
def test_exchanging_nothing_is_a_static_mask_bit_for_bit(method):
  moving, still = (Training(SparseTraining(sparsity=0.5, method=one, where='^w$'), optax.adam(0.1))
                   for one in (method, StaticMask()))
  for _ in range(5):
    moving.step(), still.step()
    pairs = zip(*(jax.tree.leaves((one.params, one.state)) for one in (moving, still)), strict=True)
    for a, b in pairs: np.testing.assert_array_equal(a, b)
