"""A whole run on text of known entropy: what it writes, that it resumes, that others can read it."""
import dataclasses
import json
import math

import jax
import numpy as np
import pytest

from efficient_lm import evaluate, generate
from efficient_lm.commands import exit_code
from efficient_lm.config import experiment
from efficient_lm.errors import CheckpointError, ConfigError
from efficient_lm.formats import MXFP4, MXFP8, Int
from efficient_lm.models import decode
from efficient_lm.parallel.replicas import digest
from efficient_lm.runs import FromRun, ledger, loading, record, run
from efficient_lm.techniques import QuantAware, Quantize, Rule
from efficient_lm.training import evaluation, trainer
from efficient_lm.tree import path_name, select
from efficient_lm.weights.quantized import Quantized

STORED = Quantize(rules=(Rule(weights=Int()),))


def rows(workdir, kind='loss'):
  lines = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
  return {row['step']: row[kind] for row in lines if kind in row}


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
  """A finished run on eight devices, of two steps more than its first half, taken up in the middle by the same call."""
  folder = tmp_path_factory.mktemp('run')
  for steps in (12, 24):
    config, default = experiment.load('tests/minute.py', [f'--config.train.steps={steps}', '--config.mesh.data=1',
                                                          '--config.mesh.fsdp=2', '--config.mesh.expert=2',
                                                          '--config.mesh.tensor=2'])
    run.run(config, default, folder)
  return folder


def test_a_run_writes_what_is_promised(workdir):
  for name in ('config.json', 'run.json', 'metrics.jsonl', 'ledger.json', 'report.html', 'tokenizer.json', 'checkpoints/24',
               'stages/1_train/24'):
    assert (workdir / name).exists(), name
  assert sorted(path.stem for path in (workdir / 'samples').iterdir()) == ['00000012', '00000024']
  assert list((workdir / 'tensorboard').rglob('events*'))


def test_every_step_is_logged_once_with_what_the_experts_did(workdir):
  assert list(rows(workdir)) == list(range(1, 25))
  for load in rows(workdir, 'load').values():
    assert np.shape(load) == (2, 4)
    np.testing.assert_allclose(np.mean(load, -1), 1, atol=1e-3)   # rounded to four digits in the file
  for name in ('moe/max_violation', 'moe/router_entropy', 'moe/dropped_share', 'grad_norm', 'skipped'):
    assert len(rows(workdir, name)) == 24


def test_an_evaluation_has_the_hash_of_the_model_whatever_mesh_it_is_on(workdir):
  found = rows(workdir, 'eval/parameters_hash')
  model = FromRun(path=str(workdir)).load()
  leaves = {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(model)}
  assert {leaf.sharding.num_devices for leaf in leaves.values()} == {1}
  assert found[24] == record.key_of({name: digest(leaf).tolist()[0] for name, leaf in leaves.items()})[:16]
  assert list(found) == [12, 24] and len(set(found.values())) == 2


def flipping(compiled_step, at: int):
  """The train step, after which, at one step, one bit of one device's copy of a parameter is another."""
  def compiled(*arguments):
    step_function = compiled_step(*arguments)
    def step(state, *more):
      state, metrics = step_function(state, *more)
      if int(state.step) != at: return state, metrics
      leaves, structure = jax.tree.flatten(state)
      name, place = next((path_name(path), i) for i, (path, leaf) in enumerate(jax.tree_util.tree_leaves_with_path(state))
                         if path_name(path).startswith('model/') and leaf.sharding.is_fully_replicated)
      pieces = [np.array(shard.data) for shard in leaves[place].addressable_shards]
      pieces[5].reshape(-1).view(np.uint32)[0] ^= 1
      pieces = [jax.device_put(piece, shard.device) for piece, shard in zip(pieces, leaves[place].addressable_shards)]
      leaves[place] = jax.make_array_from_single_device_arrays(leaves[place].shape, leaves[place].sharding, pieces)
      flipped.append(name.removeprefix('model/'))
      return jax.tree.unflatten(structure, leaves), metrics
    return step
  flipped = []
  return compiled, flipped


@pytest.mark.skipif(jax.device_count() != 8, reason='needs eight devices: run the tests on CPU')
@pytest.mark.parametrize('eval_every', [6, 100])
def test_a_copy_of_a_parameter_that_differs_ends_the_run_and_is_not_saved(tmp_path, monkeypatch, capsys, eval_every):
  """Seen by the evaluation, or by the save of the same step."""
  compiled, flipped = flipping(trainer.compiled_step, at=5)
  monkeypatch.setattr(trainer, 'compiled_step', compiled)
  words = [f'--config.train.{name}' for name in ('steps=12', f'eval_every={eval_every}', 'checkpoint_every=3')]
  config, default = experiment.load('tests/minute.py:quick', words)
  assert exit_code(lambda overrides: run.run(config, default, tmp_path), ['main']) == 7
  line, = capsys.readouterr().err.splitlines()[-1:]
  assert f'{flipped[0]} on several devices are not equal' in line and ': device 5 (process 0) differs from device 0' in line
  assert sorted(path.name for path in (tmp_path / 'checkpoints').iterdir() if path.name.isdecimal()) == ['3']
  monkeypatch.undo()
  run.run(config, default, tmp_path)   # where no bit flips
  assert list(rows(tmp_path)) == list(range(1, 13))


def test_no_loss_on_held_out_text_is_below_its_entropy(workdir):
  config = experiment.read(str(workdir))
  floor = config.data.source.entropy_nats_per_token / math.log(2)
  measured = rows(workdir, 'eval/bits_per_byte')
  # 2048 symbols are evaluated; the mean of their surprise strays from the entropy by far less than 0.05 bits.
  assert measured and all(bits > floor - 0.05 for bits in measured.values())
  assert measured[24] < measured[12] < math.log2(8) + 0.5


def test_the_ledger_has_one_row_with_the_quality_and_its_costs(workdir):
  row, = ledger.read(workdir / 'ledger.json')
  assert row.stage == '1 train'
  assert row.size.nonzero_parameters <= row.size.parameters and row.size.bits_per_parameter >= 32
  assert row.quality.bits_per_byte == rows(workdir, 'eval/bits_per_byte')[24]
  assert row.size.active_parameters < row.size.parameters
  assert row.size.bytes_on_disk > 0 and row.speed.latency_seconds > 0 and row.origin.hardware


def test_a_model_loads_on_one_device_and_evaluates_as_it_did_on_the_mesh(workdir, capsys):
  assert exit_code(evaluate.main, ['evaluate', f'--run={workdir}']) == 0
  bits = float(capsys.readouterr().out.split()[0])
  assert bits == pytest.approx(rows(workdir, 'eval/bits_per_byte')[24], abs=2e-4)   # printed with four digits


def test_generate_streams_the_same_text_for_the_same_seed(workdir, capsys):
  texts = []
  for seed in (1, 1, 2):
    words = ['generate', f'--run={workdir}', '--prompt=abc', '--tokens=20', f'--seed={seed}']
    assert exit_code(generate.main, words) == 0
    texts.append(capsys.readouterr().out.strip())
  assert texts[0] == texts[1] != texts[2]
  assert all(text.startswith('abc') and len(text) == 23 for text in texts)


@pytest.mark.parametrize('words, said', [
  (['--tokens=0'], '--tokens = 0'), (['--temperature=-1'], '--temperature = -1'), (['--top_p=0'], '--top_p = 0'),
  (['--top_k=0'], '--top_k = 0'), (['--prompt='], "--prompt = ''"), (['--run=/nowhere'], '/nowhere'),
  (['--cache=int5'], "--cache = 'int5': must be one of float, int8, int4"),
  (['--cache=float', '--cache_group=4'], '--cache_group = 4: is not for --cache=float'),
  (['--cache=int8', '--cache_group=0'], '--cache_group = 0: must be at least 1'),
])
def test_generate_refuses_in_one_line(workdir, capsys, words, said):
  assert exit_code(generate.main, ['generate', f'--run={workdir}', '--prompt=abc', '--tokens=4', '--temperature=1',
                                   '--seed=0', *words]) == 2
  error = capsys.readouterr().err.strip()
  assert said in error and '\n' not in error
  for name in ('top_k', 'top_p'): generate.FLAGS[name].value = None
  generate.FLAGS['cache'].value, generate.FLAGS['cache_group'].value = None, None


def bits_of(workdir, capsys, *words):
  """Bits per byte of the held-out text, as `evaluate` prints them."""
  assert exit_code(evaluate.main, ['evaluate', f'--run={workdir}', *words]) == 0
  evaluate.FLAGS['cache'].value, evaluate.FLAGS['cache_group'].value = None, None
  return float(capsys.readouterr().out.split()[0])


def test_a_cache_in_eight_bits_changes_the_loss_by_next_to_nothing_and_one_in_four_by_little(workdir, capsys):
  # Of about 2.5 bits a byte. Half a step is 1/254 or 1/14 of the largest of eight numbers: such small heads round badly.
  exact = bits_of(workdir, capsys, '--cache=float')
  change = {name: abs(bits_of(workdir, capsys, f'--cache={name}') - exact) for name in ('int8', 'int4')}
  assert change['int8'] <= 2e-3 and change['int4'] <= 4e-2
  assert abs(bits_of(workdir, capsys, '--cache=int8', '--cache_group=16') - exact) <= 2e-3


def test_reading_through_a_float_cache_costs_nothing(workdir):
  """Documents are not kept apart there, so that is asked of a row that holds one."""
  model, ids = loading.load_model(workdir), np.random.default_rng(0).integers(0, 8, (2, 12)).astype(np.int32)
  ones = np.ones((2, 11), np.int32)
  batch = {'inputs_BT': ids[:, :-1], 'targets_BT': ids[:, 1:], 'weights_BT': ones, 'bytes_BT': ones}
  whole = {**batch, 'positions_BT': np.cumsum(ones, 1) - 1, 'segments_BT': ones}
  np.testing.assert_allclose(decode.cached_sums(model, batch), evaluation.evaluation_sums(model, whole), rtol=1e-5)


def test_evaluate_refuses_a_missing_text(workdir, capsys):
  assert exit_code(evaluate.main, ['evaluate', f'--run={workdir}', '--text=/nowhere']) == 2
  assert '--text' in capsys.readouterr().err
  evaluate.FLAGS['text'].value = None


def test_a_run_that_has_not_begun_or_not_come_so_far_says_so(workdir, tmp_path):
  (tmp_path / 'config.json').write_text((workdir / 'config.json').read_text())
  with pytest.raises(CheckpointError, match='no checkpoint'): loading.load_model(tmp_path)
  (tmp_path / 'run.json').write_text((workdir / 'run.json').read_text())
  with pytest.raises(CheckpointError, match='has not come to its last stage, 1 train'): loading.load_model(tmp_path)
  with pytest.raises(CheckpointError, match='has no stage 7: its stages are 1 train'): loading.load_model(workdir, stage=7)


@pytest.fixture(scope='module')
def stored(workdir, tmp_path_factory):
  """A run that trains nothing, with one stage, from the model of another run."""
  folder = tmp_path_factory.mktemp('stored')
  config, default = experiment.load('tests/minute.py', ['--config.train.steps=0', '--config.mesh.fsdp=1'])
  config.model, config.start, config.stages = None, FromRun(path=str(workdir)), (STORED,)
  run.run(config, default, folder)
  return folder


def test_what_a_run_starts_from_and_every_stage_get_rows_of_their_own(workdir, stored):
  trained, = ledger.read(workdir / 'ledger.json')
  start, stage = ledger.read(stored / 'ledger.json')
  assert (start.stage, stage.stage) == ('0 start', '1 quantize')
  assert start.quality.bits_per_byte == pytest.approx(trained.quality.bits_per_byte, rel=1e-5)   # another mesh
  assert stage.quality.bits_per_byte == pytest.approx(start.quality.bits_per_byte, rel=0.01)
  assert stage.quality.bits_per_byte != start.quality.bits_per_byte and stage.notes[0].startswith('Quantize')
  assert stage.size.bytes_in_memory < 0.6 * start.size.bytes_in_memory and stage.size.parameters == start.size.parameters
  assert stage.size.bits_per_parameter < 0.6 * start.size.bits_per_parameter
  assert (stored / 'samples' / 'stage_1.txt').is_file()
  lines = record.committed(stored, record.read(stored).plan[1])['weights']
  assert {line['kind'] for line in lines} == {'float32', 'int8 per channel'}


def test_what_a_run_leaves_is_the_model_of_its_last_stage_and_others_can_be_asked_for(workdir, stored, capsys):
  assert len(dict(select(loading.load_model(stored), Quantized))) == 7
  start, stage = ledger.read(stored / 'ledger.json')
  for words, row in (([], stage), (['--stage=1'], stage), (['--stage=0'], start)):
    assert exit_code(evaluate.main, ['evaluate', f'--run={stored}', *words]) == 0
    assert float(capsys.readouterr().out.split()[0]) == pytest.approx(row.quality.bits_per_byte, abs=1e-4)
    evaluate.FLAGS['stage'].value = None
  assert exit_code(generate.main, ['generate', f'--run={stored}', '--prompt=abc', '--tokens=8']) == 0


def test_a_run_taken_up_again_does_nothing_twice(stored):
  before = {path: path.read_bytes() for path in stored.rglob('*') if path.is_file() and 'report' not in path.name}
  run.run(experiment.read(str(stored)), experiment.read(str(stored)), stored)
  assert {path: path.read_bytes() for path in before} == before


@pytest.mark.parametrize('rule, said', [
  (Rule(where='blcoks', weights=Int()), "rules[0] with where='blcoks' decides nothing: no weight matches; the paths are"),
  (Rule(weights=MXFP4()), 'stacks/0/blocks/attention/key: groups of 32 do not divide 16 inputs: choose'),
  (Rule(weights=Int(), activations=MXFP8()), 'groups of 32 do not divide 16 inputs'),
], ids=['nothing matches', 'weights', 'activations'])
@pytest.mark.parametrize('field', ['techniques', 'stages'])
def test_what_does_not_suit_the_model_is_refused_in_one_line_before_anything_is_written(tmp_path, field, rule, said):
  """By a stage, too: not after hours of training."""
  config, default = experiment.load('tests/minute.py:dense', ['--config.train.steps=1'])
  made = {'techniques': QuantAware, 'stages': Quantize}[field](rules=(rule,))
  config = dataclasses.replace(config, **{field: (made,)})
  with pytest.raises(ConfigError) as caught: run.run(config, default, tmp_path / 'run')
  assert str(caught.value).startswith(f"config.{field}[0] = '{type(made).__name__}': ") and said in str(caught.value)
  assert '\n' not in str(caught.value) and not (tmp_path / 'run').exists()
