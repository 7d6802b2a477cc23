"""What is done again when a run is taken up with other settings, after a kill, or on other text: all that has to be, and
nothing else."""
import contextlib
import dataclasses
import json
import shutil

import numpy as np
import pytest

from efficient_lm.config import Train, experiment
from efficient_lm.data import BPE, TextFiles
from efficient_lm.errors import CheckpointError, ConfigError
from efficient_lm.formats import Group, Int
from efficient_lm.runs import FromRun, commits, ledger, loading, record, run
from efficient_lm.techniques import Convert, Prune, PruneOnce, QuantAware, Quantize, Rule
from tests import minute
from tests.leaving import left


def quick(steps: int = 4, **changes):
  """An experiment of a few steps."""
  made = minute.get_config('quick')
  return dataclasses.replace(made, train=dataclasses.replace(made.train, steps=steps), **changes)


def perform(workdir, made):
  """What the command does with a config that it has read."""
  experiment.validate(made, str(workdir))
  experiment.refuse_other(str(workdir), made)
  run.run(made, made, workdir)


def stages_made(workdir, made) -> list[str]:
  """Names of the stages that a run performs, in their order."""
  performed, original = [], run.Run._perform_one
  def noted(self, step, model):
    performed.append(step.planned.name)
    return original(self, step, model)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(run.Run, '_perform_one', noted)
    perform(workdir, made)
  return performed


INT4 = Rule(weights=Int(bits=4, scales=Group(size=8)))
RECIPE = (PruneOnce(sparsity=0.5),
          Train(training=dataclasses.replace(quick().train, steps=3), techniques=(QuantAware(rules=(INT4,)),)),
          Convert(), Quantize(rules=(Rule(where='embed', weights=Int()),)))


@pytest.fixture(scope='module')
def recipe(tmp_path_factory):
  """A finished run of five stages."""
  folder = tmp_path_factory.mktemp('recipe')
  perform(folder, quick(stages=RECIPE))
  return folder


def copied(folder, tmp_path):
  return shutil.copytree(folder, tmp_path / 'copy')


def test_a_recipe_keeps_its_zeros_and_bits_to_the_end(recipe):
  rows = ledger.read(recipe / 'ledger.json')
  assert [row.stage for row in rows] == ['1 train', '2 pruneonce', '3 train', '4 convert', '5 quantize']
  zeros = [row.size.parameters - row.size.nonzero_parameters for row in rows]
  assert zeros[0] == 0 and zeros[1] > 0.3 * rows[1].size.parameters and min(zeros[2:]) >= zeros[1]
  assert rows[4].size.bits_per_parameter < rows[3].size.bits_per_parameter < 0.5 * rows[0].size.bits_per_parameter
  assert rows[3].quality.bits_per_byte == pytest.approx(rows[2].quality.bits_per_byte, rel=1e-6), 'the same numbers, stored'
  steps = [(line['stage'], line['step']) for line in map(json.loads, (recipe / 'metrics.jsonl').read_text().splitlines())]
  assert steps == sorted(steps) and steps[-1] == (5, 7), 'one axis over both trainings'


def test_the_same_command_again_does_nothing(recipe, tmp_path):
  folder = copied(recipe, tmp_path)
  assert stages_made(folder, quick(stages=RECIPE)) == []
  assert left(folder) == left(recipe)


def test_more_steps_go_on_with_the_training_and_make_all_that_followed_again(recipe, tmp_path):
  folder, first = copied(recipe, tmp_path), left(recipe)
  longer = quick(steps=6, stages=RECIPE)
  assert stages_made(folder, longer) == ['1 train', '2 pruneonce', '3 train', '4 convert', '5 quantize']
  losses = [json.loads(line)['step'] for line in (folder / 'metrics.jsonl').read_text().splitlines() if '"loss"' in line]
  assert losses == list(range(1, 10)), 'each step once'
  assert left(folder)['5 quantize'] != first['5 quantize']
  fresh = tmp_path / 'fresh'
  for steps in (4, 6): perform(fresh, quick(steps=steps))
  perform(fresh, longer)
  assert left(fresh) == left(folder), 'as a run whose training had those steps before anything followed it'


def test_stages_are_appended_changed_and_removed_without_doing_what_comes_before_them_again(recipe, tmp_path):
  folder = copied(recipe, tmp_path)
  more = (*RECIPE, Quantize(rules=(Rule(where='own_head', weights=Int()),)))
  assert stages_made(folder, quick(stages=more)) == ['6 quantize']
  assert len(ledger.read(folder / 'ledger.json')) == 6
  other = (*RECIPE[:3], Quantize(rules=(Rule(where='embed', weights=Int(bits=4, scales=Group(size=8))),)))
  assert stages_made(folder, quick(stages=other)) == ['5 quantize']
  assert len(ledger.read(folder / 'ledger.json')) == 5
  assert stages_made(folder, quick(stages=RECIPE[:1])) == []
  assert [row.stage for row in ledger.read(folder / 'ledger.json')] == ['1 train', '2 pruneonce']
  assert loading.load_model(folder).embed.kind == 'float32', 'what the run has left is that of its last stage'


@pytest.mark.thinned
@pytest.mark.parametrize('moment', ['before the commit', 'after the commit'])
@pytest.mark.parametrize('number', range(1, 6))
def test_a_kill_between_what_a_stage_makes_and_its_commit_or_its_ledger_row_loses_nothing(recipe, tmp_path, moment, number):
  """From the stage on everything is made again, or, once it is committed, only what follows it."""
  folder, made = copied(recipe, tmp_path), quick(stages=RECIPE)
  for planned in record.read(folder).plan[number - 1:]:
    for step in record.stage_folder(folder, planned).glob('[0-9]*'): shutil.rmtree(step)
  (folder / 'ledger.json').unlink()

  class Killed(Exception): pass

  def killed(*arguments, name='commit' if moment.startswith('before') else 'write_ledger'): raise Killed
  with pytest.MonkeyPatch.context() as patch, contextlib.suppress(Killed):
    patch.setattr(commits, 'commit' if moment.startswith('before') else 'write_ledger', killed)
    perform(folder, made)
  first = number if moment.startswith('before') else number + 1
  names = ['1 train', '2 pruneonce', '3 train', '4 convert', '5 quantize']
  assert stages_made(folder, made) == names[first - 1:]
  assert left(folder) == left(recipe)


def test_a_damaged_commit_is_noticed(recipe, tmp_path):
  folder = copied(recipe, tmp_path)
  manifest = folder / 'stages' / '4_convert' / '7' / record.MANIFEST
  manifest.write_text(manifest.read_text().replace('Convert: ', 'Cinvert: '))
  assert stages_made(folder, quick(stages=RECIPE)) == ['4 convert', '5 quantize']
  assert left(folder) == left(recipe)


def test_a_training_of_a_run_that_was_begun_otherwise_is_another_run(recipe, tmp_path):
  folder = copied(recipe, tmp_path)
  for other in (quick(steps=3, stages=RECIPE), quick(seed=1, stages=RECIPE), quick(techniques=(Prune(sparsity=0.5),))):
    with pytest.raises(ConfigError, match='holds another run'): perform(folder, other)
  assert left(folder) == left(recipe)


# ------------------------------------------------------------------ text, tokenizers, sources

def text(folder, names, start: int = 0):
  folder.mkdir(parents=True, exist_ok=True)
  for i, name in enumerate(names, start):
    rng = np.random.default_rng(i)
    (folder / f'{name}.txt').write_text(' '.join(rng.choice(['the', 'cat', 'sat', 'on', f'a{i % 7}', 'mat'], 400)))


def on_text(folder, workdir=None, **changes):
  """An experiment on the files of a folder, by byte pairs that are fitted to it."""
  made = quick()
  data = dataclasses.replace(made.data, source=TextFiles(train=(f'{folder}/*.txt',), heldout_fraction=0.3),
                             tokenizer=BPE(vocab_size=300))
  model = None if 'start' in changes else dataclasses.replace(made.model, vocab_size=320)
  return dataclasses.replace(made, data=data, model=model, **changes)


def test_a_run_keeps_its_tokenizer_and_says_that_the_text_has_changed(tmp_path, capsys):
  text(tmp_path / 'text', ['a', 'b', 'c', 'd'])
  perform(tmp_path / 'run', on_text(tmp_path / 'text'))
  tokenizer = (tmp_path / 'run' / 'tokenizer.json').read_text()
  held = ledger.read(tmp_path / 'run' / 'ledger.json')[0].quality
  text(tmp_path / 'text', ['e', 'f'], start=50)
  capsys.readouterr()
  more = on_text(tmp_path / 'text', stages=(Quantize(rules=(Rule(weights=Int()),)),))
  assert stages_made(tmp_path / 'run', more) == ['2 quantize']
  assert (tmp_path / 'run' / 'tokenizer.json').read_text() == tokenizer
  assert 'the text has changed since the run began: ' in capsys.readouterr().out
  trained, stage = ledger.read(tmp_path / 'run' / 'ledger.json')
  assert trained.quality == held and 'the text has changed' in stage.notes[-1]
  assert trained.origin.corpus_hash != stage.origin.corpus_hash


def test_a_start_brings_its_tokenizer_and_a_teacher_must_have_the_same(tmp_path):
  """Equal settings fitted to other text are other ids."""
  text(tmp_path / 'one', ['a', 'b', 'c'])
  text(tmp_path / 'two', ['x', 'y', 'z'], start=90)
  (tmp_path / 'two' / 'w.txt').write_text('zzzz qqqq wwww vvvv ' * 300)
  perform(tmp_path / 'base', on_text(tmp_path / 'one'))
  base = FromRun(path=str(tmp_path / 'base'))
  from efficient_lm.techniques import Distill
  with pytest.raises(ConfigError, match='trained with another tokenizer'):
    perform(tmp_path / 'student', on_text(tmp_path / 'two', techniques=(Distill(teacher=base),)))
  assert not (tmp_path / 'student').exists()
  perform(tmp_path / 'tuned', on_text(tmp_path / 'two', start=base))
  assert record.tokenizer(tmp_path / 'tuned').key == record.tokenizer(tmp_path / 'base').key
  student = on_text(tmp_path / 'two', techniques=(Distill(teacher=base),))
  student = dataclasses.replace(student, data=dataclasses.replace(student.data, tokenizer=base))
  perform(tmp_path / 'student', student)
  assert record.tokenizer(tmp_path / 'student').key == record.tokenizer(tmp_path / 'base').key
  (tmp_path / 'base').rename(tmp_path / 'moved')
  first = left(tmp_path / 'student')
  stage = Quantize(rules=(Rule(weights=Int()),))
  assert stages_made(tmp_path / 'student', dataclasses.replace(student, stages=(stage,))) == ['2 quantize'], 'without either'
  assert left(tmp_path / 'student')['1 train'] == first['1 train']
  longer = dataclasses.replace(student, train=dataclasses.replace(student.train, steps=6))
  with pytest.raises((ConfigError, CheckpointError), match='base'): perform(tmp_path / 'student', longer)
  assert loading.load_model(tmp_path / 'student', stage=1), 'nothing is lost'


def test_a_run_is_whole_when_what_it_started_from_is_gone_and_made_again_when_that_is_another(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  perform(tmp_path / 'base', quick())
  tuned = quick(model=None, start=FromRun(path='base'), stages=(Quantize(rules=(Rule(weights=Int()),)),))
  tuned = dataclasses.replace(tuned, train=dataclasses.replace(tuned.train, steps=2))
  perform(tmp_path / 'tuned', tuned)
  first = left(tmp_path / 'tuned')
  (tmp_path / 'base').rename(tmp_path / 'elsewhere')
  assert loading.load_model(tmp_path / 'tuned').embed.kind == 'float32'
  more = dataclasses.replace(tuned, stages=(*tuned.stages, Quantize(rules=(Rule(where='embed', weights=Int()),))))
  assert stages_made(tmp_path / 'tuned', more) == ['3 quantize'], 'resumed without its source'
  assert {name: value for name, value in left(tmp_path / 'tuned').items() if name in ('1 train', '2 quantize')} == {
    name: value for name, value in first.items() if name in ('1 train', '2 quantize')}
  perform(tmp_path / 'base', quick(seed=5))
  assert stages_made(tmp_path / 'tuned', tuned) == ['0 start', '1 train', '2 quantize'], 'the source is another model now'
  assert (tmp_path / 'tuned' / 'checkpoints.old').is_dir(), 'nothing is thrown away'
  with pytest.raises(ConfigError, match=r'holds no config\.json'):
    perform(tmp_path / 'new', dataclasses.replace(tuned, start=FromRun(path='gone')))
