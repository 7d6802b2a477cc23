"""Fields that came later are written only where they say something."""
import dataclasses

import pytest

from efficient_lm.config import fields
from efficient_lm.models import spec
from efficient_lm.models.added import added, stored
from efficient_lm.runs import record


@dataclasses.dataclass(kw_only=True)
class Described:
  """With two fields of later."""
  width: int = 1
  cap: float | None = added(None)
  inner: spec.PreNorm = added(make=spec.PreNorm)


@pytest.mark.parametrize('changes, names', [
  ({}, ['width']), (dict(width=2), ['width']), (dict(cap=1.), ['width', 'cap']),
  (dict(inner=spec.PostNorm()), ['width', 'inner'])], ids=str)
def test_a_field_of_later_is_stored_where_it_differs_from_its_default(changes, names):
  assert [field.name for field in stored(Described(**changes))] == names


def plain():
  attention = spec.GroupedQuery(num_heads=2, num_kv_heads=1, head_dim=4)
  stack = spec.Stack(num_layers=1, attention=attention, mlp=spec.SwiGLU(hidden=4))
  return spec.Transformer(vocab_size=8, dim=4, stacks=(stack,))


def test_the_json_of_a_model_as_it_always_was_has_no_field_of_later():
  """Neither has the key of a stage that holds one: what such a run has made is not made again."""
  data = fields.to_json(plain())
  assert set(data) == {'class', 'vocab_size', 'dim', 'stacks', 'tied', 'norm_eps', 'dtype'}
  assert set(data['stacks'][0]) == {'class', 'num_layers', 'attention', 'mlp', 'unroll', 'remat'}
  assert set(data['stacks'][0]['attention']['rope']) == {'class', 'theta', 'layout'}
  assert record.settings_of(plain(), {}) == data
  assert fields.from_json(data) == plain()


def test_a_model_with_everything_comes_back_from_its_json():
  attention = spec.GroupedQuery(num_heads=2, num_kv_heads=1, head_dim=4, biases=('query',), softcap=5., scale=.3,
                                rope=spec.Rope(scaling=spec.Yarn(factor=2., original_length=8)))
  layers = (spec.Layer(attention=attention, mlp=spec.Gated(hidden=4, activation='gelu')),
            spec.Layer(attention=dataclasses.replace(attention, rope=None), mlp=spec.Plain(hidden=4, activation='relu')),
            spec.Layer(attention=attention, mlp=spec.MoE(num_experts=2, hidden=4, shared=spec.SigmoidGated(
              inner=spec.SwiGLU(hidden=4)))))
  stack = spec.Repeated(num_repeats=2, layers=layers, block=spec.SandwichNorm())
  model = spec.Transformer(vocab_size=8, dim=4, stacks=(stack,), norm=spec.LayerNorm(bias=False),
                           ends=spec.Ends(positions=spec.Learned(length=9), embed_scale=2., softcap=3.))
  fields.check(model)
  assert fields.from_json(fields.to_json(model)) == model
