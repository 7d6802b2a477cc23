"""Layers apart compute the same, train the same, and may have formats of their own."""
import dataclasses
import json
import pathlib

import jax
import numpy as np
import pytest

from efficient_lm import tree
from efficient_lm.compression.rules import Rule
from efficient_lm.config import experiment as experiments
from efficient_lm.config import presets
from efficient_lm.errors import IncompatibleError
from efficient_lm.formats import Group, Int
from efficient_lm.models.moe.layer import MoE
from efficient_lm.runs import invariants
from efficient_lm.techniques.distillation.distill import Distill
from efficient_lm.techniques.moe.upcycle import Upcycle
from efficient_lm.techniques.pruning.prune_once import PruneOnce
from efficient_lm.techniques.quantization.gptq import Gptq
from efficient_lm.techniques.quantization.ptq import Quantize
from efficient_lm.techniques.unroll import Unroll
from efficient_lm.training import learner, trainer
from efficient_lm.training.evaluation import evaluation_sums
from efficient_lm.training.optimizers import AdamW
from efficient_lm.weights.quantized import Quantized
from efficient_lm.weights.weight import Weight
from tests.compressing import (
  B,
  Context,
  T,
  abstractly,
  assert_structure,
  assert_the_same,
  batch_of,
  family,
  logits_of,
  model_of,
)

pytestmark = pytest.mark.usefixtures('quick_compilation')

CONFIG = pathlib.Path(__file__).parents[2] / 'configs' / 'quantized.py'


@dataclasses.dataclass
class Given:
  """A teacher."""
  model: object

  def load(self, mesh=None): return self.model


def apart(**kinds): return Unroll()(model_of(**kinds), Context())[0]


def batch():
  ones = np.ones((B, T), np.int32)
  return batch_of() | {'weights_BT': ones.astype(np.float32), 'bytes_BT': ones}


def steps(model, *techniques, count=2, accumulate=1):
  """The metrics of some steps of training, and the state after them."""
  made = learner.assemble(model, AdamW().build(10), techniques, jax.random.key(0), steps=10)
  state, step, rows = learner.initial_state(made), trainer.compiled_step(made, accumulate), []
  for _ in range(count):
    state, metrics = step(state, made.loss, batch())
    rows.append(trainer.scalars(metrics))
  return rows, state


@pytest.mark.parametrize('mlp', ['dense', 'experts'])
def test_it_changes_nothing_but_names(mlp):
  model, notes = Unroll()(model_of(mlp=mlp), Context())
  assert_the_same(model, model_of(mlp=mlp))
  assert_structure(abstractly(Unroll(), model_of(mlp=mlp)), model)
  assert len(notes) == 1


def test_each_layer_gets_the_format_of_its_rule_and_is_evaluated():
  layer = lambda i, bits: Rule(where=f'blocks/{i}/.*(up|down)$', weights=Int(bits=bits, scales=Group(size=8)))
  stored, _ = Quantize(rules=(layer(0, 4), layer(1, 8)), method=Gptq(block=16), sequences=8)(apart(), Context())
  assert {path: weight.format.bits for path, weight in tree.select(stored, Quantized)} == {
    f'stacks/0/blocks/{i}/mlp/{name}': bits for i, bits in ((0, 4), (1, 8)) for name in ('up', 'down')}
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(evaluation_sums(stored, batch())))


def test_a_pruned_pattern_is_refused_and_another_one_unrolled():
  """A promise of zeros is one of a place of the pattern, and does not say how many repeats follow it."""
  assert_the_same(family('pattern'), Unroll()(family('pattern'), Context())[0])
  pruned, _ = PruneOnce(sparsity=.5)(family('pattern'), Context())
  with pytest.raises(IncompatibleError, match='stacks/0 is a pruned repeated pattern'): Unroll()(pruned, Context())


def test_what_is_promised_of_a_stack_is_promised_of_each_layer():
  pruned, _ = PruneOnce(sparsity=0.5)(model_of(), Context())
  promised = Unroll().follow(invariants.read(pruned))
  assert set(promised) == {f'stacks/0/blocks/{i}/{path.removeprefix("stacks/0/blocks/")}'
                           for path in invariants.read(pruned) for i in range(2)}
  assert invariants.check(invariants.read(pruned), Unroll()(pruned, Context())[0], Unroll()) == []


@pytest.mark.thinned
@pytest.mark.parametrize('mlp, accumulate', [('dense', 1), ('experts', 1), ('experts', 2)])
def test_it_trains_as_the_stack_does(mlp, accumulate):
  """The loss before the first step, and what experts report, are those of the stack; so is where the step leads."""
  (rows, _), (wanted, _) = (steps(model, accumulate=accumulate) for model in (apart(mlp=mlp), model_of(mlp=mlp)))
  assert rows[0].keys() == wanted[0].keys()
  for row, other in zip(rows, wanted):
    for name in ('loss', 'cross_entropy', 'grad_norm'):   # float32 sums in another order
      assert row[name] == pytest.approx(other[name], rel=1e-3), name
  if mlp == 'experts': np.testing.assert_allclose(rows[0]['load'], wanted[0]['load'], atol=0.1)
  assert rows[1]['cross_entropy'] < rows[0]['cross_entropy']


def test_each_layer_is_upcycled_and_begins_with_the_same_logits():
  mixture = Upcycle(num_experts=2)(learner.Learner(apart(), None, None), jax.random.key(0)).model
  assert [path for path, _ in tree.select(mixture, MoE)] == [f'stacks/0/blocks/{i}/mlp' for i in range(2)]
  assert_the_same(mixture, model_of())
  rows, _ = steps(apart(), Upcycle(num_experts=2))
  assert all(np.isfinite(row['loss']) for row in rows) and np.shape(rows[0]['load']) == (2, 2)


@pytest.mark.parametrize('unrolled', ['teacher', 'student', 'both'])
def test_a_model_apart_teaches_and_is_taught(unrolled):
  """Teacher and student are equal: the divergence is 0, up to float32 sums in another order."""
  teacher = apart() if unrolled in ('teacher', 'both') else model_of()
  student = apart(mlp='experts') if unrolled == 'student' else apart() if unrolled == 'both' else model_of()
  rows, _ = steps(student, Distill(teacher=Given(teacher)))
  assert all(np.isfinite(row['loss']) for row in rows)
  if unrolled == 'student': assert rows[0]['teacher_kl'] > 1e-3
  else: assert abs(rows[0]['teacher_kl']) < 1e-5


def test_the_config_of_mixed_precision_gives_the_outer_layers_eight_bits(tmp_path, monkeypatch):
  """Of a tiny model of as many layers: a step of training, and the stages."""
  monkeypatch.chdir(tmp_path)
  baseline = tmp_path / 'runs' / 'baseline' / 'config.json'
  baseline.parent.mkdir(parents=True)
  baseline.write_text(json.dumps(experiments.to_json(presets.dense())))
  experiment, _ = experiments.load(f'{CONFIG}:mixed')
  model, notes = model_of(num_layers=4), []
  rows, state = steps(model, *experiment.techniques, count=1)
  assert np.isfinite(rows[0]['loss'])
  model = state.model
  for stage in experiment.stages:
    stage = dataclasses.replace(stage, sequences=8) if hasattr(stage, 'sequences') else stage
    shapes = abstractly(stage, model)
    model, said = stage(model, Context())
    assert_structure(shapes, model)
    notes += said
  bits = {path: weight.format.bits for path, weight in tree.select(model, Quantized)}
  found = [{number for path, number in bits.items() if path.startswith(f'stacks/0/blocks/{i}/')} for i in range(4)]
  assert found == [{8}, {4}, {4}, {8}] and len(bits) == 28 + 2
  assert bits['embed'] == bits['own_head'] == 8 and {path for path, _ in tree.select(model, Weight)} == set(bits)
  assert notes[0].startswith('Unroll') and np.isfinite(logits_of(model)).all()
