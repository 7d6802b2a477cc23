"""The words of the command: what is read, in which windows, beside what, and how it is said."""
import json

import jax
import numpy as np
import pytest

from efficient_lm import evaluate
from efficient_lm.commands import exit_code
from efficient_lm.config import experiment
from efficient_lm.data import SymbolTokenizer
from efficient_lm.runs import FromRun, record, run

FLAGS = ('run', 'stage', 'text', 'limit', 'window', 'stride', 'end', 'reference', 'json', 'cache', 'cache_group')


def config_of(seed=0):
  return experiment.load('tests/minute.py:quick', ['--config.train.steps=0', f'--config.seed={seed}'])


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
  """Two runs of no steps, whose models read the same eight symbols. A text of 500 of them."""
  jax.config.update('jax_disable_most_optimizations', True)   # compiling is all that takes time here
  folder = tmp_path_factory.mktemp('runs')
  for seed, name in enumerate(('first', 'second')): run.run(*config_of(seed), folder / name)
  (folder / 'text.txt').write_text(''.join('abcdefgh'[i] for i in np.random.default_rng(0).integers(0, 8, 500)))
  yield folder
  jax.config.update('jax_disable_most_optimizations', False)


@pytest.fixture
def said(folders, capsys):
  """said(*words, code): what the command says of the first run, read as JSON where that is asked for."""
  def call(*words, code=0, name='first'):
    try: assert exit_code(evaluate.main, ['evaluate', f'--run={folders / name}', *words]) == code
    finally:
      for flag in FLAGS: evaluate.FLAGS[flag].unparse()
    out, err = capsys.readouterr()
    if code: return err
    return json.loads(out) if '--json' in words else out
  return call


def test_one_line_of_json_has_what_the_sentence_rounds(said, folders):
  found, sentence = said('--json'), said()
  assert sentence.startswith(f'{found["bits_per_byte"]:.4f} bits per byte, perplexity {found["perplexity"]:.3f} a token')
  assert found['run'] == str(folders / 'first') and found['text'] is found['reference'] is None and 'kl' not in found
  assert (found['window'], found['stride']) == (32, 32), 'as it was trained'


def test_windows_and_limits_count_what_they_say(said, folders):
  text = f'--text={folders / "text.txt"}'
  whole = said('--json', text)
  assert (whole['tokens'], whole['bytes']) == (499, 499), 'nothing stands before the first symbol'
  for words, window, stride in ((('--window=16',), 16, 16), (('--stride=7',), 32, 7), (('--stride=32',), 32, 32)):
    found = said('--json', text, *words)
    assert (found['tokens'], found['window'], found['stride']) == (499, window, stride)
  assert found['nats_per_token'] == whole['nats_per_token'], 'side by side is what it is without'
  assert said('--json', text, '--limit=100')['tokens'] == 100
  assert said('--json', text, '--limit=100000') == whole


def test_ids_in_a_file_are_rows_that_begin_anew(said, folders):
  tokenizer = record.tokenizer(folders / 'first')
  ids = tokenizer.encode((folders / 'text.txt').read_text()).reshape(10, 50)
  np.save(folders / 'ids.npy', ids)
  found = said('--json', f'--text={folders / "ids.npy"}', '--window=50')
  assert (found['tokens'], found['bytes']) == (490, 490)
  nats = []
  for row in ids:
    np.save(folders / 'row.npy', row)
    nats.append(said('--json', f'--text={folders / "row.npy"}', '--window=50')['nats_per_token'])
  assert found['nats_per_token'] == pytest.approx(np.mean(nats), rel=1e-6)   # sums in another order


def test_a_reference_adds_a_line(said, folders):
  assert said('--json', f'--reference={folders / "first"}')['kl'] == 0
  other = f'--reference={folders / "second"}'
  found, sentence = said('--json', other), said(other).splitlines()
  assert found['kl'] > 0 and 0 < found['same_top'] < 1 and found['reference'] == str(folders / 'second')
  assert found['reference_perplexity'] == pytest.approx(said('--json', name='second')['perplexity'], rel=1e-6)
  assert sentence[1].startswith(f'KL {found["kl"]:.6f} nats a token from the reference, whose perplexity is')
  assert len(sentence) == 2


def test_a_reference_with_another_vocabulary_is_refused(said, folders, monkeypatch):
  """Of as many ids, which stand for the same symbols in another order."""
  own = FromRun.tokenizer
  monkeypatch.setattr(FromRun, 'tokenizer', lambda source: (
    SymbolTokenizer('hgfedcba') if source.path.endswith('second') else own(source)))
  assert '--reference' in said(f'--reference={folders / "second"}', code=2)


@pytest.mark.parametrize('words, wrong', [
  (('--limit=0',), '--limit = 0: must be at least 1'), (('--window=0',), '--window = 0: must be at least 1'),
  (('--stride=33',), '--stride = 33: must be from 1 to 32'), (('--window=9', '--stride=10'), 'must be from 1 to 9'),
  (('--noend',), '--end = False: only a text file'), (('--reference=/nowhere',), '/nowhere'),
  (('--reference=.', '--cache=int8'), 'cannot be used with --cache'), (('--text=/nowhere',), "--text = '/nowhere'"),
])
def test_what_is_wrong_is_one_line(said, words, wrong):
  error = said(*words, code=2)
  assert wrong in error and error.count('\n') == 1


@pytest.mark.parametrize('array', [np.zeros((2, 3)), np.full((2, 3), 8), np.full(3, -1), np.zeros((1, 2, 3), int),
                                   np.array(['text']), np.zeros(1, int), np.array([{}])])
def test_what_holds_no_ids_is_refused(said, tmp_path, array):
  np.save(tmp_path / 'ids.npy', array)
  error = said(f'--text={tmp_path / "ids.npy"}', code=2)
  assert '--text' in error and error.count('\n') == 1
