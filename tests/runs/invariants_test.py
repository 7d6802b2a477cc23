"""What a stage must keep: read before it, held against what it leaves; what is lost is an error, or is said."""
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_lm.errors import IncompatibleError
from efficient_lm.formats import Group, Int
from efficient_lm.runs import invariants
from efficient_lm.techniques import (
  Awq,
  GivingUp,
  Gptq,
  PruneOnce,
  Quantize,
  Rotate,
  RoundToNearest,
  Rule,
  SmoothQuant,
  Unroll,
)
from efficient_lm.techniques.pruning.prune_once import NofM
from efficient_lm.tree import rewrite, select
from efficient_lm.weights.invariants import Bits, Experts, Pattern, Zeros
from efficient_lm.weights.weight import Dense, Weight
from tests.compressing import Context, model_of

INT4 = Rule(weights=Int(bits=4, scales=Group(size=8)))


@dataclasses.dataclass
class Forget:
  """A stage that replaces every weight by a plain one, of which it forgets the zeros."""
  gives_up: tuple[str, ...] = ()

  def __call__(self, model, context): return self.abstract(model), ('Forget',)

  def abstract(self, model):
    return rewrite(model, Weight, lambda _, weight: Dense(weight.materialize() + 1, weight.axes, weight.inputs))


@pytest.fixture(scope='module', params=['dense', 'experts'])
def pruned(request):
  return PruneOnce(sparsity=0.5)(model_of(mlp=request.param), Context())[0]


def test_what_is_promised_is_read_from_the_weights_themselves(pruned):
  promised = invariants.read(pruned)
  kinds = {type(one) for found in promised.values() for one in found}
  assert Zeros in kinds and (Experts in kinds) == any(weight.axes.startswith('E') for _, weight in select(pruned, Weight))
  assert invariants.read(None) == {}


def test_a_loss_is_an_error_that_names_weight_and_stage(pruned):
  with pytest.raises(IncompatibleError, match=r'stacks/0/.* has lost its zeros \(\d+\.\d% zeros\) in Forget: if that is'):
    invariants.check(invariants.read(pruned), Forget()(pruned, None)[0], Forget())


def test_a_loss_that_is_declared_is_said(pruned):
  stage = Forget(gives_up=('zeros',))
  note, = invariants.check(invariants.read(pruned), stage(pruned, None)[0], stage)
  assert note.startswith('Forget has given up the zeros of ') and 'such as stacks/0/' in note


@pytest.mark.thinned
@pytest.mark.parametrize('stage', [
  *(Quantize(rules=(INT4,), method=method, sequences=8, least_tokens=1) for method in (RoundToNearest(), Gptq(), Awq())),
  SmoothQuant(sequences=8), Unroll()],
  ids=lambda stage: type(getattr(stage, 'method', stage)).__name__)
def test_every_stage_keeps_zeros_or_says_so(pruned, stage):
  """Counted in what it leaves, without its own help."""
  before = {path: np.asarray(weight.materialize()) == 0 for path, weight in select(pruned, Weight)}
  after, _ = stage(pruned, Context())
  invariants.check(invariants.read(pruned), after, stage)
  zeros = sum(zero.sum() for zero in before.values())
  assert sum(int(jnp.sum(weight.materialize() == 0)) for _, weight in select(after, Weight)) >= zeros > 0


@pytest.mark.parametrize('quantized', [False, True])
def test_what_a_rotation_would_lose_is_known_from_shapes(pruned, quantized):
  """Before anything is trained; where nothing is promised, or it is given up, it is let through."""
  given = Quantize(rules=(INT4,), method=RoundToNearest())(pruned, Context())[0] if quantized else pruned
  before, after = (jax.eval_shape(lambda model: model, model) for model in (given, Forget()(given, None)[0]))
  lost = ('zeros', 'bits') if quantized else ('zeros',)
  with pytest.raises(IncompatibleError, match=r"would lose its (zeros|bits) in Rotate: if that is meant, write GivingUp"):
    invariants.check_shapes(before, after, Rotate())
  invariants.check_shapes(before, after, GivingUp(stage=Rotate(), lost=lost))
  invariants.check_shapes(before, before, Rotate())
  invariants.check_shapes(before, after, Unroll())
  invariants.check_shapes(after, after, Rotate())


def test_a_rotation_gives_zeros_up_only_where_it_is_told_to(pruned):
  promised = invariants.read(pruned)
  with pytest.raises(IncompatibleError): invariants.check(promised, Rotate()(pruned, Context())[0], Rotate())
  stage = GivingUp(stage=Rotate(), lost=('zeros',))
  assert invariants.check(promised, stage(pruned, Context())[0], stage)


def test_two_of_four_are_kept_whatever_their_place_in_the_array(pruned):
  model, _ = PruneOnce(pattern=NofM())(model_of(), Context())
  found = [one for found in invariants.read(model).values() for one in found if isinstance(one, Pattern)]
  assert found and {(one.n, one.m) for one in found} == {(2, 4)}
  invariants.check(invariants.read(model), Quantize(rules=(INT4,))(model, Context())[0], Quantize(rules=(INT4,)))
  with pytest.raises(IncompatibleError): invariants.check(invariants.read(model), Forget()(model, None)[0], Forget())


def test_bits_only_fall():
  model, _ = Quantize(rules=(INT4,))(model_of(), Context())
  promised = invariants.read(model)
  assert any(isinstance(one, Bits) and one.bits == 4 for found in promised.values() for one in found)
  with pytest.raises(IncompatibleError, match='has lost its bits'): invariants.check(promised, model_of(), Forget())


def test_a_weight_that_is_gone_is_named(pruned):
  promised = {'nowhere': (Zeros(jnp.ones((2, 2), bool)),), **invariants.read(pruned)}
  with pytest.raises(IncompatibleError, match='nowhere is no longer there'): invariants.check(promised, pruned, Unroll())


def test_what_was_read_outlives_the_arrays(pruned):
  model = jax.tree.map(lambda leaf: leaf.copy(), pruned)
  promised = invariants.read(model)
  for leaf in jax.tree.leaves(model): leaf.delete()
  assert invariants.check(promised, pruned, Forget()) == []
