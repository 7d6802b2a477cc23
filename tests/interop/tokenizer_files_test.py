"""A tokenizer that is written gives the ids that it gave, to this project and, where it is installed, to transformers."""
import json
import pathlib

import numpy as np
import pytest

from efficient_lm.data import tokenizers
from efficient_lm.interop import tokenizer_files, vocabulary

FIXTURES = pathlib.Path(__file__).parent / 'fixtures' / 'tokenizers'
TEXTS = ('def f(x):\n\treturn "déjà vu"  \r\n', '漢字 \U0001f600 e\u0301', ' ', "it's 12345")


def made(name: str):
  """By name: one of the folders there, or one made here."""
  if name == 'own bytes': return tokenizers.ByteTokenizer()
  if name == 'bytes without a beginning': return tokenizers.ByteTokenizer(bos=None)
  if name == 'own pairs': return tokenizers.BPE(vocab_size=400).fit([text.encode() * 50 for text in TEXTS], 'tests')
  return vocabulary.read(str(FIXTURES / name))


NAMES = ('own bytes', 'bytes without a beginning', 'own pairs', 'bytes', 'bytes_bos', 'pieces', 'pieces_bare')


@pytest.mark.parametrize('name', NAMES)
def test_what_is_written_is_read_as_the_same_tokenizer(name, tmp_path):
  tokenizer = made(name)
  assert tokenizer_files.write(tokenizer, str(tmp_path)) == ()
  (tmp_path / 'config.json').write_text(json.dumps(tokenizer_files.marks_of(tokenizer)))
  again = vocabulary.read(str(tmp_path))
  assert (again.bos, again.eod, again.stops, getattr(again, 'template', None)) == (
    tokenizer.bos, tokenizer.eod, tokenizer.stops, getattr(tokenizer, 'template', None))
  for text in TEXTS:
    np.testing.assert_array_equal(again.prompt(text), tokenizer.prompt(text))
    assert again.decode_bytes(again.encode(text)) == tokenizer.decode_bytes(tokenizer.encode(text))


@pytest.mark.parametrize('name', NAMES)
def test_transformers_gives_the_same_ids(name, tmp_path):
  transformers = pytest.importorskip('transformers')
  tokenizer = made(name)
  tokenizer_files.write(tokenizer, str(tmp_path))
  theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path), local_files_only=True)
  for text in TEXTS: assert theirs(text)['input_ids'] == tokenizer.prompt(text).tolist()
  assert theirs.eos_token_id == tokenizer.eod and theirs.bos_token_id == tokenizer.bos


def test_one_over_symbols_leaves_no_file_and_says_so(tmp_path):
  (note,) = tokenizer_files.write(tokenizers.SymbolTokenizer('abc'), str(tmp_path))
  assert 'symbols' in note and not list(tmp_path.iterdir())
