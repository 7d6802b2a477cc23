"""Pruning at once and layer after layer: masks by the formulas of scores, on what pruned layers before give, on any mesh."""
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_lm.compression import calibration, hessian, masks, pruning
from efficient_lm.compression.allocation import Erk, Global, Owl, Uniform
from efficient_lm.compression.patterns import NofM, PerMatrix
from efficient_lm.compression.scores import Magnitude
from efficient_lm.errors import IncompatibleError
from efficient_lm.parallel import sharding
from efficient_lm.techniques import Blocks, PruneOnce, SparseGpt, Taylor, Wanda
from efficient_lm.tree import select
from efficient_lm.weights.biased import Biased
from efficient_lm.weights.invariants import Pattern
from efficient_lm.weights.layout import Layout
from efficient_lm.weights.low_precision import low_precision
from efficient_lm.weights.masked import Masked
from efficient_lm.weights.rotated import Rotated
from efficient_lm.weights.weight import Dense, Weight
from tests.compressing import Context, abstractly, assert_structure, batch_of, family, logits_of, model_of

pytestmark = pytest.mark.usefixtures('quick_compilation')

LETTERS = [('DF', 'D', (16, 6)), ('NHD', 'NH', (2, 8, 5)), ('EFD', 'F', (3, 8, 5)), ('DNH', 'D', (8, 2, 4))]


def draw(*shape, seed=0):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def by_size(weight, share=0.5, pattern=None):
  return pruning.masked(weight, {}, share, score=Magnitude(), pattern=pattern or PerMatrix())


def once(**fields): return PruneOnce(sequences=16, least_tokens=1, **fields)


def statistics(model, *names):
  """Of the inputs of all weights of the layers, by path."""
  paths = [path for path, _ in select(model, Weight, r'^stacks/.*(query|up|down|output)$')]
  return pruning.inputs(model, paths, calibration.first_batches(Context().batches(16), 16), names)


# ------------------------------------------------------------------ one weight

@pytest.mark.parametrize('axes, inputs, shape', LETTERS)
@pytest.mark.parametrize('n, m', [(2, 4), (1, 4), (1, 2), (3, 4)])
def test_of_every_few_inputs_the_largest_stay(axes, inputs, shape, n, m):
  weight = Dense(draw(2, *shape), axes, inputs)
  made = by_size(weight, pattern=NofM(n=n, m=m))
  layout = Layout.of(weight)
  size_OI, keep_OI = (np.asarray(layout.matrix(x)).reshape(-1, m) for x in (
    jnp.abs(weight.materialize()), made.keep.get_value()))
  assert np.all(keep_OI.sum(-1) == n)
  assert np.all(np.where(keep_OI, size_OI, np.inf).min(-1) >= np.where(keep_OI, -np.inf, size_OI).max(-1))
  assert made.pattern == Pattern(n, m) and made.pattern.held_by(made)


@pytest.mark.parametrize('axes, inputs, shape', LETTERS)
def test_a_share_of_each_matrix_is_that_of_pruning_in_training(axes, inputs, shape):
  weight = Dense(draw(2, *shape), axes, inputs)
  np.testing.assert_array_equal(by_size(weight, 0.3).keep.get_value(), masks.magnitude_mask(weight.materialize(), 0.3, axes))


@pytest.mark.parametrize('axes, inputs, shape', LETTERS)
def test_a_mask_that_a_weight_has_stays_in_force(axes, inputs, shape):
  dense = Dense(draw(*shape), axes, inputs)
  first = by_size(dense, 0.25)
  second = by_size(first, 0.5)
  both = by_size(second, pattern=NofM(n=2, m=4))
  for before, after in ((first, second), (second, both)):
    assert all(one.held_by(after) for one in before.invariants())
  assert both.pattern == Pattern(2, 4) and both.pattern.held_by(both)
  assert by_size(both, 0.6).pattern == Pattern(2, 4)
  lowered = low_precision(dense, dict(forward='int8', dgrad=None, wgrad=None))
  assert by_size(lowered).product == 'float, zeros too', 'how gradients were computed is over'


def test_a_bias_stays_around_and_rotated_inputs_are_refused():
  made = by_size(Biased(Dense(draw(8, 4), 'FD', 'F'), draw(4)))
  assert isinstance(made, Biased) and isinstance(made.inner, Masked)
  with pytest.raises(IncompatibleError, match='has rotated inputs: prune before rotating'):
    by_size(Rotated(Dense(draw(8, 4), 'FD', 'F'), 8))


# ------------------------------------------------------------------ layer after layer

def test_a_layer_is_calibrated_on_what_pruned_layers_before_it_give():
  """Masks of the second layer are those of Wanda's formula on the inputs that the pruned first one leaves, and on no
  others."""
  stage = once(score=Wanda(), sparsity=0.5, where='query$')
  model, (_, said, divergence) = stage(model_of(), Context())
  path = 'stacks/0/blocks/attention/query'
  before, after = dict(select(model_of(), Weight))[path], dict(select(model, Weight))[path]
  layout, differs = Layout.of(before), []
  for i in range(2):
    for seen, same in ((model, True), (model_of(), i == 0)):
      norms_I = np.sqrt(np.asarray(statistics(seen, 'square')[path]['square'])[i])
      score_OI = np.abs(np.asarray(layout.matrix(before.materialize()))[i]) * norms_I
      expected = np.argsort(np.argsort(score_OI, -1, kind='stable'), -1, kind='stable') >= score_OI.shape[1] // 2
      found = np.asarray(layout.matrix(after.keep.get_value()))[i]
      if same: np.testing.assert_array_equal(found, expected)
      else: differs.append(np.any(found != expected))
  assert differs == [True]
  assert said == 'calibrated on 256 tokens' and divergence.startswith('KL to the float model: ')


@pytest.mark.thinned
@pytest.mark.parametrize('score, attention, mlp', [
  (SparseGpt(block=16), 'latent', 'experts'), (Wanda(), 'grouped', 'experts'), (Taylor(), 'grouped', 'dense')],
  ids=lambda one: one if isinstance(one, str) else type(one).__name__)
def test_two_of_every_four_inputs_stay_in_every_matrix(score, attention, mlp):
  """Whatever the einsum of the weight: queries, outputs with two letters of inputs, latent ones, experts."""
  stage, model = once(score=score, pattern=NofM()), model_of(attention, mlp)
  context = Targets()
  pruned, _ = stage(model, context)
  found = dict(select(pruned, Masked))
  assert len(found) >= 7
  for path, weight in found.items():
    matrix_OI = np.asarray(Layout.of(weight).matrix(weight.materialize()))
    groups = matrix_OI.reshape(*matrix_OI.shape[:-1], -1, 4)
    assert np.all(np.count_nonzero(groups, axis=-1) == 2), path
    assert weight.pattern == Pattern(2, 4)
  assert_structure(abstractly(stage, model), pruned)


class Targets(Context):
  """With what a loss asks for."""

  def batches(self, count):
    for batch in super().batches(count):
      ones = np.ones(batch['inputs_BT'].shape, np.float32)
      yield batch | {'weights_BT': ones if self.mesh is None else sharding.place(ones, self.mesh)}


def test_updated_weights_leave_less_error_than_their_masks_alone():
  """Of the first layer, whose inputs are the float model's; and the note says how much."""
  model, (_, said, _) = once(score=SparseGpt(), sparsity=0.5)(model_of(), Context())
  left = float(re.search(r'output error (0\.\d+) of that of the same zeros and no update', said)[1])
  path, before, after = 'stacks/0/blocks/mlp/up', model_of(), model
  old, new = (dict(select(one, Weight))[path] for one in (before, after))
  gram_II, layout = statistics(before, 'gram')[path]['gram'][0], Layout.of(old)
  old_OI, new_OI, keep_OI = (layout.matrix(x)[0] for x in (old.materialize(), new.materialize(), new.keep.get_value()))
  error = lambda made_OI: float(jnp.sum(hessian.output_error(made_OI - old_OI, gram_II)))
  assert left < 0.9 and error(new_OI) < error(old_OI * keep_OI)
  assert np.mean(np.asarray(keep_OI)) == 0.5 and not np.any(np.asarray(new_OI)[~np.asarray(keep_OI)])


def test_an_expert_that_saw_too_few_tokens_is_pruned_by_magnitude_and_named():
  stage = PruneOnce(score=SparseGpt(), sparsity=0.5, where='experts/up$', sequences=8, least_tokens=10 ** 6)
  pruned, notes = stage(model_of(mlp='experts'), Context())
  plain, _ = PruneOnce(sparsity=0.5, where='experts/up$')(model_of(mlp='experts'), Context())
  for a, b in zip(*(dict(select(model, Masked)).values() for model in (pruned, plain)), strict=True):
    np.testing.assert_array_equal(a.materialize(), b.materialize())
  assert any('by magnitude, for want of 1000000 tokens: stacks/0/blocks/mlp/experts/up 0.0, ' in note for note in notes)


def test_layers_of_other_families_are_pruned_with_their_biases():
  pruned, _ = once(score=Wanda(), sparsity=0.5)(family('pattern'), Context())
  biased = {path for path, _ in select(family('pattern'), Biased)}
  weights = dict(select(pruned, Weight))
  assert biased and all(isinstance(weights[path].inner, Masked) for path in biased)
  assert np.isfinite(logits_of(pruned)).all()


# ------------------------------------------------------------------ allocations

@pytest.mark.thinned
@pytest.mark.parametrize('score, mlp, allocation', [
  (Magnitude(), 'experts', Uniform()), (Magnitude(), 'experts', Erk()), (Magnitude(), 'experts', Global()),
  (Wanda(), 'dense', Owl(most=0.2)), (Magnitude(), 'dense', Owl(most=0.2))],
  ids=lambda one: one if isinstance(one, str) else type(one).__name__)
def test_every_allocation_gives_as_many_zeros_as_were_asked_for(score, mlp, allocation):
  stage = once(score=score, pattern=PerMatrix(), sparsity=0.6, allocation=allocation)
  pruned, notes = stage(model_of(mlp=mlp), Context())
  keeps = [np.asarray(weight.keep.get_value()) for _, weight in select(pruned, Masked)]
  total, gone = sum(keep.size for keep in keeps), sum(np.sum(~keep) for keep in keeps)
  # Each matrix rounds its share down, by less than one zero: two layers, and four experts in some.
  assert -1 <= 0.6 * total - gone <= sum(int(np.prod(keep.shape[:-2])) if keep.ndim > 2 else 1 for keep in keeps)
  of_layers = {round(float(np.mean(~layer)), 2) for keep in keeps for layer in keep}
  assert (len(of_layers) == 1) == isinstance(allocation, Uniform)
  assert any(note.startswith(type(allocation).__name__) for note in notes) != isinstance(allocation, Uniform)


def test_a_global_threshold_compares_all_matrices_as_they_were():
  pruned, _ = once(score=Wanda(), pattern=PerMatrix(), sparsity=0.5, allocation=Global(), where='(query|up)$')(
    model_of(), Context())
  seen, gone, kept = statistics(model_of(), 'square'), [], []
  for path, weight in select(pruned, Masked):
    layout = Layout.of(weight)
    score = np.abs(layout.matrix(dict(select(model_of(), Weight))[path].materialize())) * np.sqrt(
      seen[path]['square'])[:, None]
    keep = np.asarray(layout.matrix(weight.keep.get_value()))
    gone.append(np.asarray(score)[~keep])
    kept.append(np.asarray(score)[keep])
  assert np.concatenate(gone).max() <= np.concatenate(kept).min()
  assert len(np.concatenate(gone)) == len(np.concatenate(kept))


# ------------------------------------------------------------------ on a mesh, and what is refused

@pytest.mark.thinned
@pytest.mark.parametrize('mlp, score', [('dense', Wanda()), ('experts', SparseGpt(block=8))], ids=['Wanda', 'SparseGPT'])
def test_over_eight_devices_it_prunes_as_on_one(mesh, mlp, score):
  """What comes out lies on the mesh, with as many zeros; sums in another order turn a few choices around, so models are
  compared by what they compute."""
  stage = once(score=score, sparsity=0.5)
  alone, _ = stage(model_of(mlp=mlp), Context())
  with mesh(1, 2, 2, 2):
    here = jax.sharding.get_mesh()
    spread = jax.device_put(model_of(mlp=mlp), sharding.shardings(model_of(mlp=mlp), here))
    model, _ = stage(spread, Context(mesh=here))
    for leaf, wanted in zip(jax.tree.leaves(model), jax.tree.leaves(sharding.shardings(model, here)), strict=True):
      assert leaf.sharding.is_equivalent_to(wanted, leaf.ndim)
    logits = np.asarray(logits_of(model, sharding.place(batch_of(77), here)))
  for a, b in zip(*(dict(select(one, Masked)).values() for one in (alone, model)), strict=True):
    keeps = [np.asarray(one.keep.get_value()) for one in (a, b)]
    assert keeps[0].sum() == keeps[1].sum() and np.mean(keeps[0] != keeps[1]) < 0.02
  moved = jnp.mean(jnp.square(logits_of(alone, batch_of(77)) - logits_of(model_of(mlp=mlp), batch_of(77))))
  assert np.mean(np.square(logits - logits_of(alone, batch_of(77)))) < 0.1 * moved


@pytest.mark.parametrize('stage, message', [
  (once(score=Wanda(), sparsity=0.5, where='embed|own_head'), 'embed: is in no layer|embed is in no layer'),
  (once(score=Wanda(), pattern=NofM(m=64), where='up$'), 'mlp/up: 2:64: 64 does not divide 32 inputs'),
  (once(score=SparseGpt(), sparsity=0.5, pattern=Blocks(outputs=7), where='up$'), 'mlp/up: blocks of 7 x 16 do not divide'),
  (once(score=SparseGpt(), sparsity=1e-6, where='up$'), 'mlp/up: a sparsity of 1e-06 is not one zero in a matrix'),
  (once(score=Taylor(), sparsity=0.5, where='nowhere'), "matches 'nowhere'; the paths are embed")],
  ids=['no layer', 'N:M', 'blocks', 'none', 'nothing'])
def test_what_cannot_be_is_refused_before_anything_is_calibrated(stage, message):
  context = Context(available=0)
  for refused in (lambda: stage(model_of(), context), lambda: jax.eval_shape(stage.abstract, model_of())):
    with pytest.raises(IncompatibleError, match=message): refused()
