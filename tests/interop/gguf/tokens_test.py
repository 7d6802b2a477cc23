"""A tokenizer that is written gives the same ids when it is read, or is refused; llama_cpp_test compares with the engine."""
import json
import pathlib

import numpy as np
import pytest

from efficient_lm.data.tokenizers import BPE, BytePairs, ByteTokenizer, SymbolTokenizer
from efficient_lm.errors import ConfigError
from efficient_lm.interop import vocabulary as folder_vocabulary
from efficient_lm.interop.gguf import binary, reader, tokens, vocabulary

FIXTURES = pathlib.Path(__file__).parent.parent / 'fixtures' / 'tokenizers'
BYTE_LEVEL = {'type': 'ByteLevel', 'add_prefix_space': False, 'trim_offsets': True}


def again(tmp_path, tokenizer, size: int):
  """The tokenizer as it is read from a file that it was written to."""
  path = tmp_path / 'model.gguf'
  metadata = {'general.architecture': 'llama', **tokens.metadata(tokenizer, size, 'llama')}
  lines = {'token_embd.weight': binary.Line((size, 1), 'F32', lambda: np.zeros((size, 1), np.float32))}
  binary.write(str(path), metadata, lines)
  return vocabulary.tokenizer(reader.read(path))


@pytest.mark.parametrize('name', ['bytes', 'bytes_bos', 'pieces', 'pieces_bare'])
@pytest.mark.parametrize('spare', [0, 7])
def test_ids_and_marks_are_those_of_the_tokenizer(tmp_path, name, spare):
  """Also where the embedding has more rows than there are tokens."""
  tokenizer = folder_vocabulary.read(str(FIXTURES / name))
  tokenizer.template = '{{ messages }}'
  found = again(tmp_path, tokenizer, tokenizer.vocab_size + spare)
  wanted = json.loads((FIXTURES / name / 'expected.json').read_text())
  assert [ids.tolist() for ids in found.encode_all(wanted['texts'])] == wanted['ids']
  assert (found.bos, found.eod, found.template) == (tokenizer.bos, tokenizer.eod, tokenizer.template)
  assert set(found.stops) >= set(tokenizer.stops) and found.vocab_size == tokenizer.vocab_size + spare
  first = 1 if name.startswith('pieces') else 0   # <unk> is a type of its own, not a mark without text
  np.testing.assert_array_equal(found.bytes_V[first:tokenizer.vocab_size], tokenizer.bytes_V[first:])


@pytest.mark.parametrize('bos', [256, None])
def test_bytes_are_tokens_without_merges(tmp_path, bos):
  tokenizer = ByteTokenizer(bos)
  found = again(tmp_path, tokenizer, 257)
  raw = bytes(range(256)) + 'é 漢字'.encode()
  np.testing.assert_array_equal(found.encode(raw), tokenizer.encode(raw))
  assert (found.bos, found.eod, found.vocab_size) == (bos, 256, 257) and found.decode_bytes(found.encode(raw)) == raw


@pytest.mark.parametrize('cut, normal, whole, pre', [
  (BYTE_LEVEL, None, False, 'gpt-2'), (BYTE_LEVEL, {'type': 'NFC'}, False, 'olmo'),
  ({'type': 'Sequence', 'pretokenizers': [{'type': 'Digits', 'individual_digits': True}, BYTE_LEVEL]}, None, False,
   'smollm')])
def test_cuts_are_known_in_the_spelling_that_models_are_published_in(cut, normal, whole, pre):
  model = json.loads((FIXTURES / 'bytes' / 'tokenizer.json').read_text())
  model |= {'pre_tokenizer': cut, 'normalizer': normal}
  model['model']['ignore_merges'] = whole
  tokenizer = BytePairs(json.dumps(model), 400, bos=None, eod=321, foreign=True)
  assert tokens.metadata(tokenizer, 400, 'llama')['tokenizer.ggml.pre'] == pre


def test_what_llama_cpp_does_not_do_is_said():
  composing, not_composing = (folder_vocabulary.read(str(FIXTURES / name)) for name in ('bytes', 'pieces'))
  assert 'NFC' in tokens.notes(composing)[0] and tokens.notes(not_composing) == tokens.notes(None) == ()


def test_a_cut_without_a_name_is_refused():
  tokenizer = BPE(vocab_size=300)
  model = tokenizer._learn([b'the cat sat on the mat ' * 20])
  learned = BytePairs(model, 300, bos=299, eod=299)
  assert tokens.metadata(learned, 300, 'llama')['tokenizer.ggml.pre'] == 'gpt-2'
  assert tokens.notes(learned) == ('Words of more than 64 characters are cut by the tokenizer, and not by engines.',)
  other = BytePairs(model.replace('{1,64}', '{1,7}'), 300, bos=299, eod=299)
  with pytest.raises(ConfigError, match=r'tokenizer = .BytePairs.*engines have no name.*tokenizer=False'):
    tokens.metadata(other, 300, 'llama')


def test_more_ids_than_rows_and_symbols_are_refused():
  with pytest.raises(ConfigError, match='tokenizer = 257: has more ids than the embedding has rows, 256'):
    tokens.metadata(ByteTokenizer(), 256, 'llama')
  with pytest.raises(ConfigError, match='has no form in GGUF'): tokens.metadata(SymbolTokenizer(), 8, 'llama')


def test_ids_that_engines_would_not_find_are_refused():
  """A piece that no merge makes, and that engines would make, as they merge whatever is a piece."""
  tokenizer = folder_vocabulary.read(str(FIXTURES / 'pieces'))
  model = json.loads(tokenizer.model)
  model['model']['merges'] = model['model']['merges'][1:]
  tokenizer.model = json.dumps(model)
  tokenizer._encoder = type(tokenizer._encoder).from_str(tokenizer.model)
  with pytest.raises(ConfigError, match='gives other ids than engines'):
    tokens.metadata(tokenizer, tokenizer.vocab_size, 'llama')
