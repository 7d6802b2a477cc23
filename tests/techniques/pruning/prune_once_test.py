"""One-shot pruning: the smallest magnitudes of each matrix go, as many as were asked for, and the mask stays."""
import json

import jax
import numpy as np
import pytest

from efficient_lm.compression.rules import Rule
from efficient_lm.config import fields
from efficient_lm.errors import IncompatibleError
from efficient_lm.formats import Int
from efficient_lm.techniques import Erk, Global, NofM, Owl, PerMatrix, PerOutput, PruneOnce, Random, SparseGpt, Taylor, Wanda
from efficient_lm.techniques.quantization.ptq import Quantize
from efficient_lm.techniques.quantization.rotate import Rotate
from efficient_lm.tree import select
from efficient_lm.weights.layout import Layout
from efficient_lm.weights.masked import Masked
from efficient_lm.weights.weight import Weight
from tests.compressing import Context, abstractly, assert_structure, model_of

pytestmark = pytest.mark.usefixtures('quick_compilation')

UP = 'stacks/0/blocks/mlp/up'


def matrices(weight):
  """(number of them, O, I): of each layer and expert by itself."""
  matrix_OI = np.asarray(Layout.of(weight).matrix(weight.materialize()))
  return matrix_OI.reshape(-1, *matrix_OI.shape[-2:])


@pytest.mark.parametrize('mlp', ['dense', 'experts'])
@pytest.mark.parametrize('sparsity', [0.25, 0.9])
def test_each_matrix_loses_its_share_of_the_smallest_magnitudes(mlp, sparsity):
  stage, model = PruneOnce(sparsity=sparsity), model_of(mlp=mlp)
  pruned, (note,) = stage(model, Context())
  before, after = dict(select(model, Weight)), dict(select(pruned, Masked))
  assert len(after) == (7 if mlp == 'dense' else 10) and note.startswith(f'PruneOnce ({sparsity:.0%}, magnitude) reaches')
  for path, weight in after.items():
    for old, new in zip(matrices(before[path]), matrices(weight), strict=True):
      gone = new == 0
      assert gone.sum() == np.floor(np.float32(sparsity) * new.size), path
      assert np.abs(old[gone]).max() <= np.abs(old[~gone]).min()
      np.testing.assert_array_equal(new[~gone], old[~gone])
  assert_structure(abstractly(stage, model), pruned)


@pytest.mark.parametrize('n, m', [(2, 4), (1, 8)])
def test_a_pattern_lies_along_the_inputs_and_keeps_the_largest(n, m):
  pruned, (note,) = PruneOnce(pattern=NofM(n=n, m=m), where=r'(query|output|up)$')(model_of(), Context())
  assert f'({n}:{m}, magnitude)' in note
  before = dict(select(model_of(), Weight))
  for path, weight in select(pruned, Masked):
    groups, old = (np.concatenate(matrices(one)).reshape(-1, m) for one in (weight, before[path]))
    np.testing.assert_array_equal(np.sum(groups != 0, -1), n, err_msg=path)
    kept = np.sort(np.where(groups != 0, np.abs(old), -1), -1)[:, -n:]
    np.testing.assert_array_equal(kept, np.sort(np.abs(old), -1)[:, -n:], err_msg=path)


def test_a_mask_that_is_there_stays_in_force():
  first, _ = PruneOnce(pattern=NofM(), where='up$')(model_of(), Context())
  second, _ = PruneOnce(sparsity=0.75, where='up$')(first, Context())
  masks = [np.asarray(dict(select(model, Masked))[UP].keep.get_value()) for model in (first, second)]
  assert not np.any(masks[1] & ~masks[0]) and masks[1].mean() == 0.25
  assert dict(select(second, Masked))[UP].pattern == dict(select(first, Masked))[UP].pattern


def test_what_cannot_be_pruned_is_refused_in_one_line():
  stored, _ = Quantize(rules=(Rule(weights=Int()),))(model_of(), Context())
  rotated, _ = Rotate()(model_of(), Context())
  for model, message in ((stored, 'attention/key is stored as int8 per channel already'),
                         (rotated, 'mlp/down has rotated inputs: prune before rotating')):
    with pytest.raises(IncompatibleError, match=message): PruneOnce(sparsity=0.5)(model, Context())
    with pytest.raises(IncompatibleError, match=message): jax.eval_shape(PruneOnce(sparsity=0.5).abstract, model)
  with pytest.raises(IncompatibleError, match='mlp/down: 2:32: 32 does not divide 40 inputs'):
    PruneOnce(pattern=NofM(m=32))(model_of(), Context())
  with pytest.raises(IncompatibleError, match="matches 'blcoks'; the paths are embed"):
    PruneOnce(sparsity=0.5, where='blcoks')(model_of(), Context())


@pytest.mark.parametrize('stage', [
  PruneOnce(sparsity=0.5), PruneOnce(pattern=NofM(), score=SparseGpt(damping=0.1)),
  PruneOnce(sparsity=0.7, score=Wanda(), pattern=PerMatrix(), allocation=Owl(outlier=7.), sequences=3)], ids=repr)
def test_a_config_can_hold_it(stage):
  fields.check(stage)
  assert fields.from_json(json.loads(json.dumps(fields.to_json(stage)))) == stage


def test_what_an_earlier_version_wrote_is_read_and_means_the_same():
  written = {'class': 'PruneOnce', 'sparsity': None, 'pattern': {'class': 'NofM', 'n': 2, 'm': 4}, 'where': 'up$'}
  assert fields.from_json(written) == PruneOnce(pattern=NofM(), where='up$')
  assert fields.to_json(PruneOnce(pattern=NofM(), where='up$')) == written, 'so that no stage is made again for new fields'


def test_only_what_asks_for_no_text_is_done_by_several_processes():
  alone = [PruneOnce(sparsity=0.5, score=score) for score in (Wanda(), SparseGpt(), Taylor(), Random())]
  alone += [PruneOnce(sparsity=0.5, allocation=allocation) for allocation in (Owl(), Global())]
  assert not any(stage.across_processes for stage in alone)
  assert PruneOnce(sparsity=0.5).across_processes and PruneOnce(sparsity=0.5, allocation=Erk()).across_processes


@pytest.mark.parametrize('stage, names', [
  (PruneOnce(), ['sparsity']), (PruneOnce(sparsity=0.25, pattern=NofM()), ['sparsity']),
  (PruneOnce(sparsity=0.5, pattern=NofM()), []), (PruneOnce(sparsity=0.5, score=Wanda(), allocation=Erk()), []),
  (PruneOnce(sparsity=1.), ['sparsity']), (PruneOnce(sparsity=0.5, where='('), ['where']),
  (PruneOnce(sparsity=0.5, sequences=0, least_tokens=-1), ['sequences', 'least_tokens']),
  (PruneOnce(sparsity=0.5, score=SparseGpt(), allocation=Global()), ['allocation']),
  (PruneOnce(sparsity=0.5, score=Wanda(), allocation=Global()), ['allocation']),
  (PruneOnce(sparsity=0.5, pattern=PerOutput(), allocation=Global()), ['allocation']),
  (PruneOnce(pattern=NofM(), allocation=Owl()), ['allocation']),
  (PruneOnce(sparsity=0.5, score=Owl(), pattern=Rule(), allocation=Wanda()), ['score', 'pattern', 'allocation'])], ids=repr)
def test_a_wrong_field_is_named(stage, names):
  assert [name for name, _, _ in stage.check()] == names
