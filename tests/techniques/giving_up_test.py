"""What a stage gives up is said in the config: that stage in all else, and no other promise is touched."""
import json

import jax
import numpy as np
import pytest

from efficient_lm.config import fields
from efficient_lm.errors import IncompatibleError
from efficient_lm.runs import invariants
from efficient_lm.techniques.giving_up import KINDS, GivingUp
from efficient_lm.techniques.pruning.prune_once import NofM, PruneOnce
from efficient_lm.techniques.quantization.rotate import Rotate
from efficient_lm.techniques.unroll import Unroll
from efficient_lm.weights.invariants import Bits, Experts, Pattern, Zeros
from tests.compressing import Context, abstractly, assert_structure, model_of

pytestmark = pytest.mark.usefixtures('quick_compilation')


def test_it_does_what_its_stage_does():
  stage = GivingUp(stage=Unroll(), lost=('zeros',))
  model, notes = stage(model_of(), Context())
  plain, said = Unroll()(model_of(), Context())
  assert notes == said and stage.name == 'Unroll' and stage.gives_up == ('zeros',)
  for a, b in zip(jax.tree.leaves(model), jax.tree.leaves(plain), strict=True): np.testing.assert_array_equal(a, b)
  assert_structure(abstractly(stage, model_of()), model)
  pruned, _ = PruneOnce(sparsity=0.5)(model_of(), Context())
  assert stage.follow(invariants.read(pruned)).keys() == Unroll().follow(invariants.read(pruned)).keys()
  assert GivingUp(stage=Rotate(), lost=()).follow({'up': ()}) == {'up': ()}


def test_only_what_it_names_is_given_up():
  model, _ = PruneOnce(pattern=NofM())(model_of(), Context())
  promised, rotated = invariants.read(model), Rotate()(model, Context())[0]
  with pytest.raises(IncompatibleError, match='has lost its pattern'):
    invariants.check(promised, rotated, GivingUp(stage=Rotate(), lost=('zeros',)))
  notes = invariants.check(promised, rotated, GivingUp(stage=Rotate(), lost=('zeros', 'pattern')))
  assert len(notes) == 2 and all('Rotate has given up the ' in note and ' of 7 weights' in note for note in notes)


def test_the_kinds_are_those_that_weights_promise():
  assert set(KINDS) == {one.kind for one in (Zeros, Pattern, Bits, Experts)}
  assert [problem[:2] for problem in GivingUp(stage=Rotate(), lost=('zeros', 'nulls')).check()] == [('lost', 'nulls')]


def test_a_config_can_hold_it():
  whole = GivingUp(stage=Rotate(hidden=64), lost=('zeros',))
  fields.check(whole)
  assert fields.from_json(json.loads(json.dumps(fields.to_json(whole)))) == whole
