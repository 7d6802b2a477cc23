"""Blocks that are pruned are gone: not stored, not multiplied, not trained, through training, saving and decoding."""
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_lm.compression import rewriting
from efficient_lm.compression.coverage import coverage
from efficient_lm.compression.rules import LAYERS, Rule
from efficient_lm.errors import IncompatibleError
from efficient_lm.formats import Int
from efficient_lm.models import decode
from efficient_lm.runs import invariants, measure, structure
from efficient_lm.techniques import (
  LowPrecisionTraining,
  Prune,
  PruneBlocks,
  PruneOnce,
  QuantAware,
  Quantize,
  Rotate,
  SmoothQuant,
  StoreBlocks,
  Unroll,
)
from efficient_lm.training import learner, trainer
from efficient_lm.training.optimizers import AdamW, Muon
from efficient_lm.tree import rewrite, select
from efficient_lm.weights.block_sparse import BlockSparse
from efficient_lm.weights.layout import Layout
from efficient_lm.weights.masked import Masked
from efficient_lm.weights.weight import Dense, Weight
from tests.compressing import Context, T, abstractly, assert_structure, assert_the_same, batch_of, family, model_of

pytestmark = pytest.mark.usefixtures('quick_compilation')

BLOCK, UP = (8, 4), 'stacks/0/blocks/mlp/up'
HALF = PruneBlocks(sparsity=0.5, block=BLOCK)
DENSE = 'is stored as float32, 50.0% of its 8 x 4 blocks'


def pruned(model=None):
  return HALF(model or model_of(), Context())[0]


def dense(model):
  """The same numbers in whole matrices."""
  return rewrite(model, BlockSparse, lambda _, weight: Dense(weight.materialize(), weight.axes, weight.inputs))


def masked(model, keep=lambda keep: keep):
  """The same numbers under masks."""
  mask = lambda weight: Masked(Dense(weight.materialize(), weight.axes, weight.inputs), keep(weight.invariants()[0].keep))
  return rewrite(model, BlockSparse, lambda _, weight: mask(weight))


def norms(weight):
  """(layers, C, R): of the blocks of a weight's matrix."""
  matrix_OI = np.asarray(Layout.of(weight).matrix(weight.materialize()))
  *lead, O, I = matrix_OI.shape
  return np.sqrt(np.sum(matrix_OI.reshape(*lead, O // 4, 4, I // 8, 8) ** 2, (-3, -1)))


@pytest.mark.parametrize('attention', ['grouped', 'latent'])
def test_each_column_keeps_its_largest_blocks_and_as_many_as_asked(attention):
  model = model_of(attention)
  after, (note,) = HALF(model, Context())
  before, weights = dict(select(model, Weight)), dict(select(after, BlockSparse))
  assert set(weights) == {path for path, _ in select(model, Weight, LAYERS)}
  for path, weight in weights.items():
    old, new = norms(before[path]), norms(weight)
    kept = new > 0
    np.testing.assert_array_equal(kept.sum(-1), old.shape[-1] // 2, err_msg=path)
    np.testing.assert_allclose(new[kept], old[kept], rtol=1e-6)
    assert np.all(np.where(kept, old, np.inf).min(-1) >= np.where(kept, 0, old).max(-1)), path
  assert note.startswith('PruneBlocks (50% in blocks of 8 x 4) reaches') and 'is stored and multiplied' in note
  assert_structure(abstractly(HALF, model), after)
  assert_the_same(after, dense(after))


def test_biases_and_unequal_layers_stay():
  after, _ = HALF(family('pattern'), Context())
  assert_the_same(after, dense(after))


def test_figures_count_what_is_stored_and_multiplied_and_masks_save_nothing():
  model, after = model_of(), pruned()
  flops = lambda model: measure.flops_per_token(model, T).forward
  left = {path: int(np.sum(weight.materialize() != 0)) for path, weight in select(after, BlockSparse)}
  whole = sum(int(np.prod(weight.shape)) for path, weight in select(model, Weight) if path in left)
  assert flops(model) - flops(after) == 2 * (whole - sum(left.values())) and flops(masked(after)) == flops(model)
  assert measure.parameters(after) == measure.parameters(model)
  assert measure.nonzero_parameters(after) == measure.nonzero_parameters(masked(after))
  assert measure.bits_per_parameter(after) < 0.6 * measure.bits_per_parameter(model)
  assert measure.bits_per_parameter(masked(after)) > measure.bits_per_parameter(model)
  lines = {line.path: line for line in rewriting.table(masked(after))}
  assert lines[UP].product == 'float, zeros too' and lines[UP].num_bytes > lines[UP].float_bytes
  assert coverage(after, LAYERS).flops < coverage(model, LAYERS).flops


def test_a_mask_of_such_blocks_is_stored_without_it_and_computes_the_same():
  after = pruned()
  stage = StoreBlocks(sparsity=0.5, block=BLOCK)
  stored, (note,) = stage(masked(after), Context())
  jax.tree.map(np.testing.assert_array_equal, stored, after)
  assert note.startswith('StoreBlocks (50%') and invariants.check(invariants.read(masked(after)), stored, stage) == []
  assert_structure(abstractly(stage, masked(after)), stored)


@pytest.mark.parametrize('change, message', [
  (lambda keep: keep.at[..., 0, :].set(~keep[..., 0, :]), 'is masked within blocks of 8 inputs by 4 outputs: they'),
  (lambda keep: jnp.ones_like(keep), r'keeps 4 to 4 blocks in its columns, where sparsity = 0.5 keeps 2')])
def test_a_mask_of_other_blocks_is_refused(change, message):
  model = masked(pruned(), change)
  with pytest.raises(IncompatibleError, match=message): StoreBlocks(sparsity=0.5, block=BLOCK, where='up$')(model, Context())


@pytest.mark.parametrize('optimizer', [AdamW(), Muon()], ids=['AdamW', 'Muon'])
def test_training_moves_kept_blocks_as_those_of_a_masked_model_and_no_zero(optimizer):
  """By AdamW: Muon orthogonalises whole matrices, and leaves blocks to AdamW."""
  after = pruned()
  found = []
  for model in (after, masked(after)):
    made = learner.assemble(model, optimizer.build(3), (), jax.random.key(0), steps=3)
    state, step, ones = learner.initial_state(made), trainer.compiled_step(made), np.ones((8, T), np.int32)
    for seed in range(3):
      state, metrics = step(state, made.loss, batch_of(seed) | {'weights_BT': ones.astype(np.float32), 'bytes_BT': ones})
    found.append((state.model, metrics['loss']))
  (ours, loss), (theirs, their_loss) = found
  moved = dict(select(ours, Weight))[UP].materialize()
  assert invariants.check(invariants.read(after), ours, HALF) == []
  assert np.any(moved != dict(select(after, Weight))[UP].materialize())
  if isinstance(optimizer, AdamW):
    # Adam divides by the root of squares: where a gradient is small, the order of a sum changes a step of at most the rate.
    np.testing.assert_allclose(loss, their_loss, rtol=1e-4)
    np.testing.assert_allclose(moved, dict(select(theirs, Weight))[UP].materialize(), atol=2e-3)


def test_decoding_draws_the_same_tokens_as_the_dense_model_of_the_same_numbers():
  after, prompt = pruned(), np.array([[3, 1, 4, 1, 5]], np.int32)
  text = lambda model: np.concatenate([*decode.stream(model, prompt, 12, sampling=decode.Sampling(0.0), vocab_size=48)], 1)
  np.testing.assert_array_equal(text(after), text(dense(after)))


def test_its_structure_is_rebuilt_from_json_and_layers_come_apart():
  after = pruned()
  again = structure.rebuilt(structure.described(after))
  assert_structure(again, after)
  apart, _ = Unroll()(after, Context())
  assert len(dict(select(apart, BlockSparse))) == 14
  assert_the_same(apart, after)


REFUSED = [
  PruneOnce(sparsity=0.5), HALF, Rotate(), SmoothQuant(sequences=2), Quantize(rules=(Rule(weights=Int()),)),
  StoreBlocks(sparsity=0.5, block=BLOCK)]
TECHNIQUES = [QuantAware(rules=(Rule(weights=Int()),)), LowPrecisionTraining(), Prune(sparsity=0.5)]


@pytest.mark.parametrize('after', REFUSED, ids=lambda stage: type(stage).__name__)
def test_stages_made_for_whole_matrices_refuse_blocks_in_one_line(after):
  with pytest.raises(IncompatibleError, match=DENSE) as caught: after(pruned(), Context())
  assert '\n' not in str(caught.value)


@pytest.mark.parametrize('technique', TECHNIQUES, ids=lambda technique: type(technique).__name__)
def test_techniques_made_for_whole_matrices_refuse_blocks_in_one_line(technique):
  with pytest.raises(ValueError, match=DENSE) as caught:
    learner.assemble(pruned(), AdamW().build(2), (technique,), jax.random.key(0), steps=2)
  assert '\n' not in str(caught.value)


def test_what_has_no_such_blocks_is_refused_in_one_line():
  whole, context = model_of(), Context()
  quantized, _ = Quantize(rules=(Rule(weights=Int()),))(whole, context)
  rotated, _ = Rotate()(whole, context)
  halved, _ = PruneOnce(sparsity=0.5)(whole, context)
  for model, stage, message in (
      (whole, PruneBlocks(sparsity=0.5, block=(64, 4)), 'attention/key: blocks of 64 inputs by 4 outputs do not divide'),
      (whole, PruneBlocks(sparsity=0.9, block=BLOCK), 'attention/key has 4 blocks along its inputs, of which sparsity'),
      (model_of(mlp='experts'), HALF, 'mlp/experts/down is stacked by expert'), (quantized, HALF, 'is stored as int8'),
      (rotated, HALF, 'has rotated inputs: prune before rotating'), (halved, HALF, 'is masked already: StoreBlocks'),
      (whole, StoreBlocks(sparsity=0.5, block=BLOCK), 'has no mask: PruneBlocks'),
      (whole, dataclasses.replace(HALF, where='blcoks'), "matches 'blcoks'; the paths are")):
    with pytest.raises(IncompatibleError, match=message) as caught: stage(model, context)
    assert '\n' not in str(caught.value)
    with pytest.raises(IncompatibleError, match=message): jax.eval_shape(stage.abstract, model)


@pytest.mark.parametrize('stage, names', [
  (PruneBlocks(sparsity=0.), ['sparsity']), (PruneBlocks(sparsity=1.), ['sparsity']),
  (StoreBlocks(sparsity=0.5, where='('), ['where']), (PruneBlocks(sparsity=0.5, block=(0, 4)), ['block']),
  (PruneBlocks(sparsity=0.5, block=(4,)), ['block']), (PruneBlocks(sparsity=0.5), [])], ids=repr)
def test_a_wrong_field_is_named(stage, names):
  assert [name for name, _, _ in stage.check()] == names


def test_gradients_of_frozen_places_are_none():
  """Only blocks are parameters."""
  _, params, rest = nnx.split(pruned(), nnx.Param, ...)
  names = lambda tree: {jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)}
  assert any('blocks' in name and 'rows' not in name for name in names(params))
  assert all('rows' in name for name in names(rest))
