import copy
import dataclasses
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from efficient_lm.compression.rules import Rule
from efficient_lm.config import Experiment, Mesh, Training, fields
from efficient_lm.config import experiment as experiments
from efficient_lm.data import Corpus
from efficient_lm.errors import ConfigError
from efficient_lm.formats import Int
from efficient_lm.models import spec, zoo
from efficient_lm.runs import FromRun
from efficient_lm.techniques import Distill, Prune, QuantAware, Upcycle


def tiny(mlp=None, **more):
  train = Training(steps=10, batch_size=8, sequence_length=64)
  return Experiment(**{'model': zoo.tiny(mlp), 'data': Corpus(), 'train': train, **more})


def moe(**more):
  return tiny(zoo.experts(8, 2, 64), **more)


def quantized(weights, activations=None):
  return QuantAware(rules=(Rule(weights=weights, activations=activations),))


def training(**changes):
  return dataclasses.replace(tiny().train, **changes)


def save(workdir, experiment):
  workdir.mkdir(parents=True, exist_ok=True)
  (workdir / 'config.json').write_text(json.dumps(experiments.to_json(experiment)))


def field_refused(experiment):
  with pytest.raises(ConfigError) as caught: experiments.validate(experiment)
  assert '\n' not in str(caught.value)
  return caught.value.field


def test_valid_experiments_pass():
  for experiment in (tiny(), moe(), moe(mesh=Mesh(expert=4, data=2)), tiny(techniques=(QuantAware(),)),
                     tiny(data=Corpus(), train=training(steps=0))):
    experiments.validate(experiment)


@pytest.mark.parametrize('changes, field', [
  (dict(seed=-1), 'config.seed'),
  (dict(seed=2 ** 31), 'config.seed'),
  (dict(seed='0'), 'config.seed'),
  (dict(train=None), 'config.train'),
  (dict(train=training(steps=-1)), 'config.train.steps'),
  (dict(train=training(steps=1e3)), 'config.train.steps'),
  (dict(train=training(sequence_length=1)), 'config.train.sequence_length'),
  (dict(train=training(log_every=0)), 'config.train.log_every'),
  (dict(train=training(eval_every=0)), 'config.train.eval_every'),
  (dict(train=training(checkpoint_every=0)), 'config.train.checkpoint_every'),
  (dict(train=training(accumulate=3)), 'config.train.batch_size'),
  (dict(train=training(accumulate=8), mesh=Mesh(fsdp=2)), 'config.train.batch_size'),
  (dict(mesh=Mesh(data=16)), 'config.train.batch_size'),
  (dict(mesh=Mesh(tensor=3)), 'config.model.stacks[0].attention.num_heads'),
  (dict(mesh=Mesh(data=1, expert=0)), 'config.mesh.expert'),
  (dict(model=dataclasses.replace(zoo.tiny(), vocab_size=256)), 'config.model.vocab_size'),
  (dict(model=dataclasses.replace(zoo.tiny(), stacks=())), 'config.model.stacks'),
  (dict(model=None), 'config.model'),
  (dict(model=dataclasses.replace(zoo.tiny(), ends=spec.Ends(positions=spec.Learned(length=63)))),
   'config.train.sequence_length'),
  (dict(model=dataclasses.replace(zoo.tiny(), norm=spec.PreNorm())), 'config.model.norm'),
  (dict(techniques=QuantAware()), 'config.techniques'),
  (dict(techniques=(QuantAware,)), 'config.techniques[0]'),
  (dict(techniques=(quantized(Int(bits=1)),)), 'config.techniques[0].rules[0].weights.bits'),
  (dict(techniques=(Upcycle(num_experts=2),), mesh=Mesh(expert=4)), 'config.techniques[0].num_experts'),
])
def test_the_field_that_is_wrong_is_named(changes, field):
  assert field_refused(tiny(**changes)) == field


def test_experts_must_split_evenly_over_the_mesh():
  experiment = moe(mesh=Mesh(expert=3), train=training(batch_size=6))
  assert field_refused(experiment) == 'config.model.stacks[0].mlp.num_experts'


def test_what_get_config_returns_must_be_an_experiment():
  assert field_refused({'model': zoo.tiny()}) == 'config'


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_wrong_type_or_a_negative_number_anywhere_is_refused_where_it_is(data):
  """Every leaf in turn becomes something that it cannot be."""
  experiment = copy.deepcopy(moe(techniques=(quantized(Int(), Int()),)))
  leaves = [path for path, value in fields.walk(experiment)
            if path and not fields.is_config(value) and not isinstance(value, (tuple, type(None)))]
  path = data.draw(st.sampled_from(leaves))
  parent, _, name = path.rpartition('.')
  holder = fields.lookup(experiment, parent, '') if parent else experiment
  wrong = [object(), [], b'', float('nan')] + ([-7] if not isinstance(getattr(holder, name), (str, bool)) else [3])
  setattr(holder, name, data.draw(st.sampled_from(wrong)))
  assert field_refused(experiment).startswith('config.')


@pytest.mark.parametrize('experiment', [tiny(), moe(mesh=Mesh(expert=4)), moe(techniques=(quantized(Int(bits=3)),))])
def test_json_round_trip(experiment):
  again = experiments.from_json(json.loads(json.dumps(experiments.to_json(experiment), allow_nan=False)))
  assert again == experiment and repr(again) == repr(experiment)


def test_from_run_needs_a_run_and_brings_its_model(tmp_path):
  start = FromRun(path=str(tmp_path / 'dense'))
  assert field_refused(tiny(model=None, start=start)) == 'config.start.path'
  save(tmp_path / 'dense', tiny())
  upcycled = tiny(model=None, start=start, techniques=(Upcycle(num_experts=4),))
  experiments.validate(upcycled)
  assert experiments.model_of(upcycled) == tiny().model
  assert field_refused(tiny(start=start)) == 'config.model'


def test_a_teacher_must_share_the_tokenizer(tmp_path):
  teacher = FromRun(path=str(tmp_path))
  save(tmp_path, tiny())
  experiments.validate(tiny(techniques=(Distill(teacher=teacher),)))
  (tmp_path / 'tokenizer.json').write_text(json.dumps({'kind': 'symbols', 'symbols': 'ab'}))
  assert field_refused(tiny(techniques=(Distill(teacher=teacher),))) == 'config.techniques[0].teacher.path'


@pytest.mark.parametrize('content', [
  '', '{', '[]', '{"class": "os.system"}', '{"class": "efficient_lm.models.spec.SwiGLU", "hidden": 1}', 'null', '\x00'])
def test_a_broken_config_json_is_one_line(tmp_path, content):
  (tmp_path / 'config.json').write_text(content)
  with pytest.raises(ConfigError) as caught: experiments.read(str(tmp_path))
  assert '\n' not in str(caught.value)


def test_a_run_that_an_earlier_version_let_train_for_too_few_steps_is_read(tmp_path):
  late = tiny(techniques=(Prune(sparsity=0.5, end=10 ** 6),))
  assert field_refused(late).startswith('config.techniques[0]')
  save(tmp_path, late)
  assert experiments.read(str(tmp_path)) == late


def test_reading_a_run_executes_no_python(tmp_path):
  canary = 'open("canary", "w")'
  for name in ('config.py', '__init__.py', 'conftest.py', 'efficient_lm.py'): (tmp_path / name).write_text(canary)
  save(tmp_path, tiny())
  assert experiments.read(str(tmp_path)) == tiny()
  assert not list(tmp_path.glob('**/canary'))


def test_a_workdir_is_taken_up_only_by_the_same_run(tmp_path):
  workdir = str(tmp_path / 'run')
  experiments.refuse_other(workdir, tiny())
  save(tmp_path / 'run', tiny())
  for same in (tiny(), tiny(mesh=Mesh(fsdp=2)), tiny(train=training(steps=20, checkpoint_every=7))):
    experiments.refuse_other(workdir, same)
  for other, field in ((tiny(train=training(steps=5)), 'train.steps'), (tiny(seed=1), 'seed'), (moe(), 'stacks'),
                       (tiny(techniques=(QuantAware(),)), 'techniques')):
    with pytest.raises(ConfigError, match=field) as caught: experiments.refuse_other(workdir, other)
    assert caught.value.field == '--workdir' and '\n' not in str(caught.value)


def test_a_workdir_that_is_a_file_is_refused(tmp_path):
  (tmp_path / 'file').write_text('')
  for path in ('file', 'file/below'):
    with pytest.raises(ConfigError, match='is a file'): experiments.refuse_other(str(tmp_path / path), tiny())


def test_a_workdir_that_cannot_be_written_is_refused(tmp_path, monkeypatch):
  monkeypatch.setattr(experiments.os, 'access', lambda *_: False)   # a superuser, as in a container, may write anywhere
  with pytest.raises(ConfigError, match='cannot be written'): experiments.refuse_other(str(tmp_path / 'run'), tiny())


FILE = '''
from efficient_lm.data import Corpus
from efficient_lm.config import Experiment, Training, choose
from efficient_lm.models import zoo

def get_config(variant='tiny'):
  model = choose(variant, {'tiny': zoo.tiny(), 'small': zoo.small()})
  return Experiment(model=model, data=Corpus(), train=Training(steps=1, batch_size=2, sequence_length=8))
'''


@pytest.fixture
def config_file(tmp_path):
  path = tmp_path / 'mine.py'
  path.write_text(FILE)
  return str(path)


def test_load_gives_the_experiment_and_the_files_own(config_file):
  experiment, default = experiments.load(config_file + ':small', ['--config.seed=3'])
  assert experiment.model == zoo.small()
  assert experiments.difference(default, experiment) == [('config.seed', 0, 3)]


@pytest.mark.parametrize('line, said', [
  ('x = 1 +', 'line 10: SyntaxError'), ('raise RuntimeError("no\\nno")', 'line 10: RuntimeError'),
  ('import nothing_here', 'line 10'),
  ('del get_config', 'no get_config'), ('get_config = lambda: None', 'must return'), ('get_config = 3', 'not callable'),
  ('zoo.tiny(hiden=3)', 'hiden'), ('import sys; sys.exit(0)', 'SystemExit'),
])
def test_a_mistake_in_the_file_is_one_line(config_file, line, said):
  with open(config_file, 'a') as file: file.write('\n' + line)
  with pytest.raises(ConfigError, match=said) as caught: experiments.load(config_file)
  assert '\n' not in str(caught.value)


def test_a_class_of_the_users_own_file_survives_the_json_while_that_file_is_given(tmp_path):
  path = tmp_path / 'own.py'
  path.write_text(FILE + '''
import dataclasses
@dataclasses.dataclass
class Mine:
  share: float = 0.5
  touches = 'loss'

plain = get_config
def get_config(): return dataclasses.replace(plain(), techniques=(Mine(),))
''')
  experiment, _ = experiments.load(str(path), ['--config.techniques[0].share=0.25'])
  assert experiments.from_json(experiments.to_json(experiment)) == experiment
