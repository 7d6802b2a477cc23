import dataclasses

import pytest

from efficient_lm.compression.rules import Rule
from efficient_lm.config import fields, overrides
from efficient_lm.config.experiment import Experiment, Training
from efficient_lm.data import Corpus
from efficient_lm.errors import ConfigError
from efficient_lm.formats import Int
from efficient_lm.models import zoo
from efficient_lm.techniques.quantization.qat import QuantAware


def moe():
  return Experiment(model=zoo.tiny(zoo.experts(8, 2, 64)), data=Corpus(),
                    techniques=(QuantAware(rules=(Rule(weights=Int(bits=4)),)),),
                    train=Training(steps=10, batch_size=8, sequence_length=64))


def applied(*words):
  return overrides.apply(moe(), ['--config.' + word for word in words])


@pytest.mark.parametrize('path, text, value', [
  ('seed', '7', 7),
  ('train.steps', '1e3', 1000),
  ('train.optimizer.schedule.peak', '1e-2', 1e-2),
  ('train.optimizer.clip', 'inf', float('inf')),
  ('train.optimizer.clip', '2', 2.0),
  ('mesh.expert', '4', 4),
  ('model.dim', '64', 64),
  ('model.tied', 'false', False),
  ('model.stacks[0].num_layers', '2', 2),
  ('model.stacks[0].mlp.num_experts', '4', 4),
  ('model.stacks[0].mlp.router.top_k', '1', 1),
  ('model.stacks[0].mlp.balance[0].weight', '0.5', 0.5),
  ('model.stacks[0].attention.window', '16', 16),
  ('model.stacks[0].mlp.capacity', '1.25', 1.25),
  ('techniques[0].rules[0].weights.bits', '2', 2),
  ('techniques[0].rules[0].where', 'a=b', 'a=b'),
  ('techniques', '()', ()),
  ('data.source.max_bytes', '1_000', 1000),
])
def test_an_override_changes_that_field_and_no_other(path, text, value):
  changed = applied(f'{path}={text}')
  assert fields.lookup(changed, path, '') == value
  assert [line[0] for line in fields.difference(moe(), changed)] == ['config.' + path]


@pytest.mark.parametrize('path', ['model.stacks[0].attention.window', 'model.stacks[0].mlp.capacity'])
def test_an_optional_field_can_be_set_and_set_back(path):
  assert fields.lookup(applied(f'{path}=4'), path, '') == 4
  assert fields.lookup(applied(f'{path}=4', f'{path}=None'), path, '') is None


def test_the_last_of_two_overrides_counts():
  assert applied('seed=1', 'seed=2').seed == 2


def test_defaults_shared_between_configs_stay_as_they_are():
  applied('model.stacks[0].mlp.balance[0].weight=9')
  assert moe().model.stacks[0].mlp.balance[0].weight != 9


@pytest.mark.parametrize('word, field', [
  ('seed=x', 'config.seed'), ('seed=1.5', 'config.seed'), ('seed=inf', 'config.seed'), ('seed=', 'config.seed'),
  ('model.tied=maybe', 'config.model.tied'), ('train.optimizer.clip=a=b:c', 'config.train.optimizer.clip'),
  ('model=3', 'config.model'), ('start=runs/a', 'config.start'), ('techniques[0]=3', 'config.techniques[0]'),
  ('seed', 'config.seed'), ('sede=1', 'config.sede'), ('model.stacks[3].mlp.hidden=1', 'config.model.stacks[3]'),
])
def test_what_cannot_be_applied_names_its_field_in_one_line(word, field):
  with pytest.raises(ConfigError) as caught: applied(word)
  assert caught.value.field == field and '\n' not in str(caught.value)


def test_every_leaf_of_a_config_can_be_overridden_with_the_value_it_has():
  for path, value in fields.walk(moe()):
    if fields.is_config(value) or isinstance(value, tuple): continue
    assert applied(f'{path}={value}') == moe(), path


def test_types_are_checked_though_a_module_postpones_its_annotations():
  assert any(isinstance(field.type, str) for field in dataclasses.fields(Postponed))
  with pytest.raises(ConfigError, match='whole number'): overrides.apply(Postponed(), ['--config.size=x'])


@dataclasses.dataclass
class Postponed:
  size: 'int' = 1
