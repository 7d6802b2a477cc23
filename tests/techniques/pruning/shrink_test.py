"""What is left of a trained model is an ordinary one: it trains, resumes, is quantized, exported and read again."""
import contextlib
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_lm import tree
from efficient_lm.compression import group_scores, scores
from efficient_lm.compression.budget import Budget, Grid
from efficient_lm.compression.latency import Reading
from efficient_lm.compression.merging import MergeExperts
from efficient_lm.compression.rules import Rule
from efficient_lm.compression.shape import Shape
from efficient_lm.config import Train, experiment
from efficient_lm.data.tokenizers import ByteTokenizer
from efficient_lm.errors import IncompatibleError
from efficient_lm.formats import Group, Int
from efficient_lm.interop.huggingface import HuggingFace
from efficient_lm.interop.targets import HuggingFaceFolder
from efficient_lm.models import spec, zoo
from efficient_lm.parallel.sharding import shardings, single_device_mesh
from efficient_lm.runs import context, loading, run
from efficient_lm.techniques.giving_up import GivingUp
from efficient_lm.techniques.pruning.prune_once import PruneOnce
from efficient_lm.techniques.pruning.shrink import Shrink
from efficient_lm.techniques.quantization.ptq import Quantize
from efficient_lm.techniques.unroll import Unroll
from efficient_lm.training import learner, trainer
from efficient_lm.training.optimizers import AdamW
from efficient_lm.weights.masked import Masked
from efficient_lm.weights.quantized import Quantized
from efficient_lm.weights.weight import Weight
from tests import minute
from tests.compressing import (
  B,
  Context,
  T,
  abstractly,
  assert_structure,
  assert_the_same,
  batch_of,
  logits_of,
  model_of,
)
from tests.leaving import left, metrics

pytestmark = pytest.mark.usefixtures('quick_compilation')

INT4 = (Rule(weights=Int(bits=4, scales=Group(size=4))),)


def stage(sequences: int = 8, **sizes) -> Shrink: return Shrink(to=Shape(**sizes), sequences=sequences)


@pytest.mark.parametrize('mlp, sizes', [
  ('dense', dict(width=24, hidden=.5, layers=1)), ('experts', dict(heads=.5, experts=2, expert_hidden=.5))], ids=str)
def test_it_says_what_it_leaves_before_and_after(mlp, sizes):
  made, model = stage(**sizes), model_of(mlp=mlp)
  smaller, notes = made(model, Context())
  assert_structure(abstractly(made, model), smaller)
  share = tree.size(smaller) / tree.size(model)
  assert notes[0].startswith(f'Shrink leaves {share:.1%} of {tree.size(model)} parameters: ') and 'on 128 tokens' in notes[0]
  assert ('stacks/0: without its layers ' in ' '.join(notes)) == ('layers' in sizes)
  assert np.isfinite(logits_of(smaller)).all()


def test_what_scores_most_stays():
  """Units that write nothing are those that go: nothing changes."""
  model = model_of()
  empty = jnp.arange(40) % 2 == 0
  def change(path, weight):
    if not path.endswith('mlp/down'): return weight
    return weight.replaced(jnp.where(empty[:, None], 0, weight.materialize()))
  model = tree.rewrite(model, Weight, change)
  smaller, _ = Shrink(to=Shape(hidden=.5), scores=(scores.Taylor(),), sequences=8)(model, Context())
  assert_the_same(model, smaller)


def test_a_neutral_shape_changes_nothing():
  model = model_of()
  assert stage(width=1.0, layers=2)(model, Context())[0] is model
  assert_structure(abstractly(stage(width=1.0), model), model)


def test_a_budget_takes_the_candidate_with_the_least_loss():
  model = model_of()
  made = Shrink(to=Budget(parameters=.7, grid=Grid(hidden=(1.0, .5), layers=(1, 2), width=(32, 20)), trials=3), sequences=8)
  smaller, notes = made(model, Context())
  losses = [float(part.split(': ')[-1]) for part in notes[-1].split('; ')]
  assert len(losses) == 3 and tree.size(smaller) <= .7 * tree.size(model)
  chosen = notes[-1].split('; ')[int(np.argmin(losses))]
  hidden = 20 if 'hidden=0.5' in chosen else 40
  assert f'hidden={hidden / 40:g}' in chosen and smaller.stacks[0].blocks.mlp.up.shape[-1] == hidden
  assert abstractly(made, model) is not None


def test_a_budget_of_seconds_says_what_was_measured_of_the_model_that_is_left(monkeypatch):
  monkeypatch.setattr(Reading, 'share', lambda self, smaller: tree.size(smaller) / tree.size(model_of()))
  made = Shrink(to=Budget(latency=0.6, grid=Grid(layers=(2, 1), width=(32, 16)), trials=1, sequence_length=8), sequences=8)
  smaller, notes = made(model_of(), Context(mesh=single_device_mesh()))
  share = tree.size(smaller) / tree.size(model_of())
  assert share <= 0.6 and f'reads 8 tokens in {share:.0%} of the seconds' in notes[-1]
  assert abstractly(made, model_of()) is not None


def test_experts_are_merged_or_dropped():
  model = model_of(mlp='experts')
  dropped, _ = stage(experts=2)(model, Context())
  merged, _ = Shrink(to=Shape(experts=2), sequences=8, merge=MergeExperts())(model, Context())
  assert jax.tree.structure(dropped) == jax.tree.structure(merged)
  router = lambda made: made.stacks[0].blocks.mlp.router.materialize()
  np.testing.assert_array_equal(router(dropped), router(merged))
  assert not np.allclose(dropped.stacks[0].blocks.mlp.experts.up.materialize(),
                         merged.stacks[0].blocks.mlp.experts.up.materialize())


@pytest.mark.parametrize('shrink, message', [
  (Shrink(to=Shape(layers=1), scores=(group_scores.Activations(),)), 'layers: no score ranks them, but Activations: add'),
  (Shrink(to=Shape(hidden=.5), scores=()), 'hidden: no score ranks them, but no score'),
  (stage(experts=2), 'experts: the model has none'), (stage(heads=3), 'heads = 3: 2 key-value heads'),
  (stage(sequences=10 ** 4, hidden=.5), 'calibration asks for 10000 sequences, but the data has 32'),
  (Shrink(to=Budget(parameters=.01)), 'no shape of the grid meets parameters = 0.01')], ids=str)
def test_what_cannot_be_is_one_line_before_anything_is_done(shrink, message):
  with pytest.raises(IncompatibleError, match=message) as caught: shrink(model_of(), Context())
  assert '\n' not in str(caught.value)
  if 'calibration' in message: return
  with pytest.raises(IncompatibleError, match=message): abstractly(shrink, model_of())


@pytest.mark.parametrize('made, names', [
  (Shrink(to=Rule()), ['to']), (Shrink(to=Shape(), sequences=0), ['sequences']),
  (Shrink(to=Shape(), merge=Rule()), ['merge']),
  (Shrink(to=Shape(), scores=(Rule(),)), ['scores[0]']), (stage(width=.5), [])], ids=str)
def test_a_wrong_field_is_named(made, names):
  assert [name for name, _, _ in made.check()] == names


def test_sizes_that_a_mesh_does_not_cut_are_refused(mesh):
  with mesh(2, 1, 2, 2) as _:
    with pytest.raises(IncompatibleError, match=r'mlp: experts = 3 are left, which mesh\.expert = 2 does not divide'):
      abstractly(stage(experts=3), model_of(mlp='experts'))
    with pytest.raises(IncompatibleError, match=r'mlp: hidden = 11 are left, which mesh\.tensor = 2 does not divide'):
      abstractly(stage(hidden=11), model_of())


# ------------------------------------------------------------------ beside other stages

def test_it_stands_before_quantization_and_not_behind():
  smaller, _ = stage(hidden=.5, heads=.5)(model_of(), Context())
  stored, _ = Quantize(rules=INT4)(smaller, Context())
  assert len(dict(tree.select(stored, Quantized))) == 7 and np.isfinite(logits_of(stored)).all()
  whole, _ = Quantize(rules=INT4)(model_of(), Context())
  for refuse in (lambda: abstractly(stage(hidden=.5), whole), lambda: stage(hidden=.5)(whole, Context())):
    with pytest.raises(IncompatibleError, match=r'mlp/down is stored as int4 .*already') as caught: refuse()
    assert '\n' not in str(caught.value)
  fewer, _ = stage(layers=1)(whole, Context())   # layers are whole, whatever their weights are stored as
  assert fewer.stacks[0].num_layers == 1 and np.isfinite(logits_of(fewer)).all()


def test_masks_are_cut_and_their_zeros_stay_promised():
  from efficient_lm.runs import invariants
  pruned, _ = PruneOnce(sparsity=.5, where='(down|query)$')(model_of(mlp='experts'), Context())
  for made in (stage(hidden=.5, experts=2, layers=1), GivingUp(stage=stage(hidden=.5), lost=('zeros',))):
    before, context = invariants.read(pruned), Context()
    smaller, _ = made(pruned, context)
    assert invariants.check(before, smaller, made, context.followed) == []
    assert len(dict(tree.select(smaller, Masked))) == 3


def test_layers_apart_are_cut_alike():
  smaller, _ = stage(hidden=.5, layers=1)(Unroll()(model_of(), Context())[0], Context())
  together, _ = stage(hidden=.5, layers=1)(model_of(), Context())
  assert_the_same(smaller, together)


@pytest.mark.parametrize('mlp', ['dense', 'experts'])
def test_what_is_left_trains(mlp):
  ones = np.ones((B, T), np.int32)
  batch = batch_of() | {'weights_BT': ones.astype(np.float32), 'bytes_BT': ones}
  smaller, _ = stage(width=16, layers=1, **(dict(experts=2) if mlp == 'experts' else {}))(model_of(mlp=mlp), Context())
  made = learner.assemble(smaller, AdamW().build(10), (), jax.random.key(0), steps=10)
  state, step, losses = learner.initial_state(made), trainer.compiled_step(made, 1), []
  for _ in range(3):
    state, found = step(state, made.loss, batch)
    losses.append(trainer.scalars(found)['loss'])
  assert losses[2] < losses[0]


@pytest.mark.parametrize('mlp', ['dense', 'experts'])
def test_eight_devices_leave_what_one_does(mlp, mesh):
  """Where scores are far enough apart, which these are."""
  model, made = model_of(mlp=mlp), stage(hidden=.5, heads=.5, **(dict(experts=2) if mlp == 'experts' else dict(width=16)))
  with mesh(1, 2, 2, 2) as _:
    devices = jax.sharding.get_mesh()
    smaller, _ = made(jax.device_put(model, shardings(model, devices)), Context(mesh=devices))
  assert all(leaf.sharding.mesh.size == 8 for leaf in jax.tree.leaves(smaller))
  for a, b in zip(jax.tree.leaves(smaller), jax.tree.leaves(made(model, Context())[0]), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-6)   # scales of norms are multiplied


# ------------------------------------------------------------------ out of the project, and through a run

def exported(described: spec.Transformer):
  """A trained model's stand-in, of its own numbers."""
  return jax.jit(lambda key: described.build(rngs=nnx.Rngs(params=key)))(jax.random.key(1))


@pytest.mark.parametrize('name, made', [
  ('dense', stage(width=24, hidden=.5, layers=2, heads=.5)), ('experts', stage(experts=2, expert_hidden=.5, layers=1))])
def test_what_is_left_is_written_for_others_and_read_again(name, made, tmp_path):
  mlp = None if name == 'dense' else zoo.experts(4, 2, 16, balance=())
  described = zoo.tiny(mlp)
  described = dataclasses.replace(described, vocab_size=264, dim=32, tied=True, stacks=(dataclasses.replace(
    described.stacks[0], num_layers=3, attention=spec.GroupedQuery(num_heads=4, num_kv_heads=2, head_dim=8),
    mlp=mlp or spec.SwiGLU(hidden=40)),))
  smaller, _ = made(exported(described), Context())
  HuggingFaceFolder().write(smaller, ByteTokenizer(), str(tmp_path), 64)
  assert_the_same(smaller, HuggingFace(path=str(tmp_path)).load())


class Killed(BaseException):
  """As a kill."""


def test_a_run_that_is_killed_while_it_recovers_goes_on_and_ends_as_another(tmp_path):
  made = minute.get_config('quick')
  training = dataclasses.replace(made.train, steps=6)
  made = dataclasses.replace(made, train=dataclasses.replace(made.train, steps=2), stages=(
    stage(width=8, hidden=.5), Train(training=training)))
  experiment.validate(made)
  run.run(made, made, tmp_path / 'whole')
  log = context.Context.log
  def killing(self, step, numbers):
    if self.field == 'config.stages[1]' and step >= 4: raise Killed
    return log(self, step, numbers)
  with pytest.MonkeyPatch.context() as patch, contextlib.suppress(Killed):
    patch.setattr(context.Context, 'log', killing)
    run.run(made, made, tmp_path / 'killed')
  run.run(made, made, tmp_path / 'killed')
  assert left(tmp_path / 'killed') == left(tmp_path / 'whole')
  assert metrics(tmp_path / 'killed') == metrics(tmp_path / 'whole')
  assert loading.load_model(tmp_path / 'killed').embed.shape == (8, 8)
