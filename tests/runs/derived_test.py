"""Runs of earlier versions, which recorded less: two that were stored with the code of their time are read, and taken up."""
import json
import pathlib
import tarfile

import jax
import numpy as np
import pytest

from efficient_lm import commands, evaluate, generate
from efficient_lm.config import experiment
from efficient_lm.errors import CheckpointError
from efficient_lm.runs import FromRun, derived, ledger, loading, record, report_page, results, run
from efficient_lm.system import sealed
from efficient_lm.training.losses import outputs_of

STORED = pathlib.Path(__file__).parent / 'stored'
NAMES = ('quantized', 'lowered')   # pruned, QAT, converted, quantized; a mixture in 8 bits from step 2 on, trained in fp8


@pytest.fixture(params=NAMES)
def workdir(request, tmp_path):
  with tarfile.open(STORED / f'{request.param}.tar.gz') as archive: archive.extractall(tmp_path, filter='data')
  return tmp_path / request.param


def logits_of(model):
  tokens = np.arange(32).reshape(2, 16) % 8
  batch = {'inputs_BT': tokens, 'segments_BT': np.ones((2, 16), int), 'positions_BT': np.tile(np.arange(16), (2, 1))}
  return np.asarray(outputs_of(model, batch).logits_BTV)


def test_the_model_of_a_stored_run_computes_what_it_did(workdir):
  """Up to the order of float32 sums, in which the programs may differ."""
  then = np.load(workdir / 'logits.npy')
  np.testing.assert_allclose(logits_of(loading.load_model(workdir)), then, atol=2e-6 * np.abs(then).max())


def test_its_shapes_are_those_of_what_is_loaded(workdir):
  shapes = lambda tree: [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(tree)]
  assert shapes(loading.abstract_model(workdir)) == shapes(loading.load_model(workdir))


def test_all_commands_read_it(workdir, capsys):
  before = ledger.read(workdir / 'ledger.json')[-1].quality.bits_per_byte
  assert commands.exit_code(evaluate.main, ['evaluate', f'--run={workdir}']) == 0
  assert float(capsys.readouterr().out.split()[0]) == pytest.approx(before, abs=0.05)   # of its text another part is read
  assert commands.exit_code(generate.main, ['generate', f'--run={workdir}', '--prompt=abc', '--tokens=8']) == 0
  assert capsys.readouterr().out.startswith('abc')
  assert results.load(workdir).rows and report_page.write_report(workdir)
  if workdir.name == 'quantized': assert results.load(workdir).weights, 'its tables of weights'


def test_a_source_of_it_has_a_key_a_tokenizer_and_a_description(workdir):
  source = FromRun(path=str(workdir))
  assert source.here and source.key() and source.tokenizer().vocab_size == 8 and source.spec().dim == 16


@pytest.mark.thinned
def test_it_is_taken_up_without_training_again(workdir, capsys):
  """Its training is at its end; its stages are made again, since what they left has no record."""
  trained = json.loads((workdir / 'ledger.json').read_text())
  made = experiment.read(str(workdir))
  run.run(made, made, workdir)
  rows = ledger.read(workdir / 'ledger.json')
  assert rows[0].effort.steps == 0 and len(rows) == len(trained) == 1 + len(made.stages)
  steps = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
  assert sum('loss' in line for line in steps) == made.train.steps, 'each step once'
  then = np.load(workdir / 'logits.npy')
  np.testing.assert_allclose(logits_of(loading.load_model(workdir)), then, atol=2e-6 * np.abs(then).max())
  assert all(record.committed(workdir, planned) for planned in record.read(workdir).plan)
  for name in ('config.json', 'run.json', 'tokenizer.json'): assert sealed.is_sealed(workdir / name), 'from now on'


def test_one_that_did_not_come_to_its_last_stage_says_so(tmp_path):
  with tarfile.open(STORED / 'quantized.tar.gz') as archive: archive.extractall(tmp_path, filter='data')
  (tmp_path / 'quantized' / 'stages').rename(tmp_path / 'away')
  with pytest.raises(CheckpointError, match='has not come to its last stage'): loading.load_model(tmp_path / 'quantized')
  assert derived.saved_steps(tmp_path / 'quantized' / 'checkpoints') == [6]
