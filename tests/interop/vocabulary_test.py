"""Tokenizers in folders, against the ids of transformers (`make_tokenizers.py`)."""
import json
import pathlib
import shutil

import numpy as np
import pytest

from efficient_lm.data import tokenizers
from efficient_lm.errors import CheckpointError, ConfigError
from efficient_lm.interop import vocabulary

FIXTURES = pathlib.Path(__file__).parent / 'fixtures' / 'tokenizers'
NAMES = ('bytes', 'bytes_bos', 'pieces', 'pieces_bare')


def expected(name: str) -> dict:
  return json.loads((FIXTURES / name / 'expected.json').read_text())


def changed(tmp_path, name: str, file: str = 'tokenizer_config.json', **changes) -> str:
  """A copy of a folder with other settings."""
  shutil.copytree(FIXTURES / name, tmp_path / 'changed', dirs_exist_ok=True)
  path = tmp_path / 'changed' / file
  path.write_text(json.dumps((json.loads(path.read_text()) if path.is_file() else {}) | changes))
  return str(tmp_path / 'changed')


@pytest.mark.parametrize('name', NAMES)
def test_ids_are_those_of_transformers(name):
  tokenizer, wanted = vocabulary.read(str(FIXTURES / name)), expected(name)
  assert [ids.tolist() for ids in tokenizer.encode_all(wanted['texts'])] == wanted['ids']
  prompts = [tokenizer.prompt(text).tolist() for text in wanted['texts'] if text]
  assert prompts == [ids for text, ids in zip(wanted['texts'], wanted['prompts']) if text]
  assert (tokenizer.eod, tokenizer.vocab_size, tokenizer.stops) == (wanted['eos'], wanted['size'], (wanted['eos'],))


@pytest.mark.parametrize('name', NAMES)
def test_bytes_are_those_of_the_text(name):
  tokenizer, wanted = vocabulary.read(str(FIXTURES / name)), expected(name)
  for text, ids in zip(wanted['decoded'], wanted['ids']):   # what transformers makes of the ids: NFC, and a space less
    given = tokenizer.decode_bytes(ids)
    assert given.removeprefix(b' ' if name == 'pieces' else b'') == text.encode()
    assert tokenizer.bytes_V[ids].sum() == len(given)
  assert len(tokenizer.bytes_V) == tokenizer.vocab_size and tokenizer.bytes_V[tokenizer.eod] == 0


@pytest.mark.parametrize('name', NAMES)
def test_a_tokenizer_that_a_run_has_stored_is_the_same(name):
  tokenizer = vocabulary.read(str(FIXTURES / name))
  again, text = tokenizers.from_json(tokenizer.to_json()), 'déjà <code> vu\n\n é'
  assert (again.key, again.bos, again.eod, again.stops) == (tokenizer.key, tokenizer.bos, tokenizer.eod, tokenizer.stops)
  np.testing.assert_array_equal(again.encode(text), tokenizer.encode(text))


def test_whether_a_text_begins_with_a_mark_is_said_by_the_settings_first(tmp_path):
  bos = lambda **settings: vocabulary.read(changed(tmp_path, 'bytes_bos', **settings)).bos
  assert bos() == bos(add_bos_token=True) == 320 and bos(add_bos_token=False) is None


def test_generation_stops_at_all_that_the_files_name(tmp_path):
  path = changed(tmp_path, 'pieces', 'generation_config.json', eos_token_id=[2, 7])
  assert vocabulary.read(path).stops == (2, 7)


def test_bytes_that_are_no_text_survive_or_are_replaced():
  pairs, pieces = (vocabulary.read(str(FIXTURES / name)) for name in ('bytes', 'pieces_bare'))
  assert pairs.decode_bytes(pairs.encode(b'a\xffb')) == b'a\xffb'
  assert pieces.decode_bytes(pieces.encode(b'a\xffb')) == 'a\ufffdb'.encode()


def test_what_cannot_be_read_is_a_line(tmp_path):
  read, model = vocabulary.read, json.loads((FIXTURES / 'bytes' / 'tokenizer.json').read_text())
  with pytest.raises(ConfigError, match=r'holds no tokenizer\.json'): read(str(tmp_path))
  file = pathlib.Path(changed(tmp_path, 'bytes')) / 'tokenizer.json'
  words_only = {'type': 'WordLevel', 'vocab': {'a': 0}, 'unk_token': 'a'}
  for change, words in (({'normalizer': {'type': 'Lowercase'}}, 'changes the text'), ({'model': words_only}, 'WordLevel'),
                        ({'model': {'type': 'Nothing'}}, 'cannot be used'), ({'model': 3}, 'cannot be used')):
    file.write_text(json.dumps(model | change))
    with pytest.raises(ConfigError, match=words) as caught: read(str(file.parent))
    assert '\n' not in str(caught.value)
  file.write_text('{')
  with pytest.raises(CheckpointError, match=r'tokenizer\.json cannot be read'): read(str(file.parent))
  with pytest.raises(ConfigError, match='has no token'): read(changed(tmp_path / 'other', 'bytes', eos_token='<nowhere>'))
