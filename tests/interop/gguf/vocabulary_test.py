"""The tokenizer of a file gives the ids of the one that the file was converted from."""
import json
import pathlib

import numpy as np
import pytest

from efficient_lm.data.tokenizers import from_json
from efficient_lm.errors import IncompatibleError
from efficient_lm.interop.gguf import reader, vocabulary
from tests.interop.gguf import writing
from tests.interop.gguf.models import LLAMA, small

pytest.importorskip('tokenizers')
FIXTURES = pathlib.Path(__file__).parent.parent / 'fixtures' / 'tokenizers'
ODD = ['a  1', '  12 3\n\n 4', '😀👩‍👩‍👧 \x00\x01\x7f', 'a\r\nb\r\n\r\n',
       '<|im_end|>x<|im_start|> ', 'x' * 3000, ' ' * 300 + 'a',
       '漢字かな кириллица عربى हिन्दी', '\n' * 50, '１２３ ½ ²',
       "I'm we'LL DON'T", 'camelCaseWords HTTPServer',
       '#!/usr/bin/env x==y']


def opened(tmp_path, metadata: dict, tensors: dict | None = None) -> reader.File:
  path = tmp_path / 'model.gguf'
  path.write_bytes(writing.file(metadata, tensors or {}))
  return reader.read(path)


def converted(name: str) -> dict:
  """The metadata that conversion/base.py of llama.cpp writes of a folder's tokenizer.json."""
  stored = json.loads((FIXTURES / name / 'tokenizer.json').read_text())
  ids, added = dict(stored['model']['vocab']), {token['content']: token for token in stored['added_tokens']}
  ids |= {content: token['id'] for content, token in added.items()}
  tokens = sorted(ids, key=ids.get)
  wanted = json.loads((FIXTURES / name / 'expected.json').read_text())
  made = {'tokenizer.ggml.eos_token_id': wanted['eos'], 'tokenizer.ggml.tokens': tokens}
  kind = lambda token: ((3 if added[token]['special'] else 4) if token in added else 6 if token.startswith('<0x') else 1)
  types = [2 if token == '<unk>' else kind(token) for token in tokens]
  made['tokenizer.ggml.token_type'] = [('i32', one) for one in types]
  if name.startswith('bytes'):
    bos = {'tokenizer.ggml.bos_token_id': ids['<|endoftext|>'], 'tokenizer.ggml.add_bos_token': name == 'bytes_bos'}
    merges = [' '.join(pair) for pair in stored['model']['merges']]
    return made | bos | {'tokenizer.ggml.model': 'gpt2', 'tokenizer.ggml.pre': 'qwen2', 'tokenizer.ggml.merges': merges}
  rank = {''.join(pair): i for i, pair in reversed([*enumerate(stored['model']['merges'])])}
  scores = [-float(rank.get(token, 10 ** 6)) for token in tokens]
  return made | {'tokenizer.ggml.model': 'llama', 'tokenizer.ggml.scores': scores, 'tokenizer.ggml.bos_token_id': ids['<s>'],
                 'tokenizer.ggml.add_space_prefix': name == 'pieces'}


@pytest.mark.parametrize('name', ['bytes', 'bytes_bos', 'pieces', 'pieces_bare'])
def test_ids_are_those_of_the_tokenizer_before(tmp_path, name):
  wanted = json.loads((FIXTURES / name / 'expected.json').read_text())
  tokenizer = vocabulary.tokenizer(opened(tmp_path, converted(name)))
  assert [ids.tolist() for ids in tokenizer.encode_all(wanted['texts'])] == wanted['ids']
  prompts = [tokenizer.prompt(text).tolist() for text in wanted['texts'] if text]
  assert prompts == [ids for text, ids in zip(wanted['texts'], wanted['prompts'], strict=True) if text]
  assert (tokenizer.vocab_size, tokenizer.eod) == (wanted['size'], wanted['eos']) and wanted['eos'] in tokenizer.stops
  again = from_json(tokenizer.to_json())
  assert again.key == tokenizer.key and again.stops == tokenizer.stops
  np.testing.assert_array_equal(again.encode(ODD[2]), tokenizer.encode(ODD[2]))


@pytest.mark.parametrize('pre', sorted(vocabulary.CUTS))
def test_every_text_comes_back_whatever_the_cut(tmp_path, pre):
  """But for NFC, which none of these texts changes; marks in a text are letters like others."""
  marks = {'tokenizer.ggml.pre': pre, 'tokenizer.ggml.bos_token_id': 0}
  tokenizer = vocabulary.tokenizer(opened(tmp_path, {**small(LLAMA)[0], **marks}))
  for text in [*ODD, b'\xff\xfe broken \x80']:
    ids = tokenizer.encode(text)
    assert tokenizer.decode_bytes(ids) == (text if isinstance(text, bytes) else text.encode())
    assert not set(ids.tolist()) & {0, 1}


# What each cut does where the cuts differ, by hand.
PIECES = {
  'gpt-2': {'a  12': ['a', ' ', ' 12'], "DON'T": ['DON', "'", 'T'], 'x\r\n y': ['x', '\r\n', ' y']},
  'smollm': {'a  12': ['a', '  ', '1', '2'], 'x１２': ['x', '１', '２']},
  'olmo': {'a  12': ['a', ' ', ' 12']},
  'llama-bpe': {'a  1234': ['a', ' ', ' ', '123', '4'], "DON'T": ['DON', "'T"],
                '\tif (x)\n\n': ['\tif', ' (', 'x', ')\n\n']},
  'qwen2': {'a  123': ['a', ' ', ' ', '1', '2', '3'], "we'LL": ['we', "'LL"]},
  'gpt-4o': {'camelCase 1234': ['camel', 'Case', ' ', '123', '4'], "don't/\n": ["don't", '/\n']},
  'tekken': {'camelCase 12': ['camel', 'Case', ' ', '1', '2'], "don't": ['don', "'t"]},
  'deepseek-v3': {'a1234漢字b': ['a', '123', '4', '漢字', 'b'], '.word x': ['.word', ' x']},
}


@pytest.mark.parametrize('pre', sorted(PIECES))
def test_text_is_cut_as_the_name_says(tmp_path, pre):
  import tokenizers
  model = json.loads(vocabulary.read(opened(tmp_path, {**small(LLAMA)[0], 'tokenizer.ggml.pre': pre,
                                                       'tokenizer.ggml.bos_token_id': 0})).model)
  cut = tokenizers.Tokenizer.from_str(json.dumps(model)).pre_tokenizer
  for text, pieces in PIECES[pre].items():
    assert [text[begin:end] for _, (begin, end) in cut.pre_tokenize_str(text)] == pieces


def test_names_of_one_cut_cut_alike():
  cuts = vocabulary.CUTS
  assert cuts['llama-bpe'] == cuts['llama3'] == cuts['llama-v3'] == cuts['falcon3']
  assert cuts['dbrx'].splits == cuts['llama3'].splits and cuts['deepseek-r1-qwen'].splits == cuts['qwen2'].splits
  assert set(cuts) == {*PIECES, 'llama3', 'llama-v3', 'falcon3', 'dbrx', 'deepseek-r1-qwen'}


def test_a_piece_that_is_a_token_is_taken_whole_only_where_the_engine_does(tmp_path):
  """The last merge is missing."""
  metadata = {**small(LLAMA)[0], 'tokenizer.ggml.merges': ['h e', 'l l'], 'tokenizer.ggml.bos_token_id': 0}
  ids = lambda pre: vocabulary.tokenizer(opened(tmp_path, {**metadata, 'tokenizer.ggml.pre': pre})).encode('hell').tolist()
  assert ids('llama-bpe') == [260] and ids('qwen2') == ids('gpt-2') == [258, 259]


def test_replies_end_at_every_mark_that_ends_one(tmp_path):
  metadata = {**small(LLAMA)[0], 'tokenizer.ggml.eos_token_id': 0, 'tokenizer.ggml.eot_token_id': 258}
  found = vocabulary.read(opened(tmp_path, metadata))
  assert found.stops == (0, 258, 1), 'the end of text, the end of turn, and <|im_end|> by its name'
  assert (found.bos, found.eod) == (None, 0)


@pytest.mark.parametrize('change, words', [
  ({'tokenizer.ggml.pre': 'falcon'}, "pre = 'falcon' is not known: gpt-2"), ({'tokenizer.ggml.pre': 3}, 'pre'),
  ({'tokenizer.ggml.model': 'bert'}, "'bert': gpt2 and llama are read"), ({'tokenizer.ggml.model': 'llama'}, 'scores'),
  ({'tokenizer.ggml.tokens': 7}, 'tokens'), ({'tokenizer.ggml.tokens': []}, 'tokens'),
  ({'tokenizer.ggml.tokens': ['a', 'a'], 'tokenizer.ggml.token_type': [1, 1]}, 'twice'),
  ({'tokenizer.ggml.token_type': [1]}, 'token_type'), ({'tokenizer.ggml.merges': ['h e l']}, 'pairs'),
  ({'tokenizer.ggml.merges': 'h e'}, 'merges'), ({'tokenizer.ggml.merges': ['h qq']}, 'cannot be used'),
  ({'tokenizer.ggml.eos_token_id': 261}, 'none of its 261'), ({'tokenizer.ggml.eos_token_id': 'x'}, 'eos'),
  ({'tokenizer.ggml.add_bos_token': True}, 'bos_token_id')], ids=str)
def test_a_tokenizer_that_is_not_understood_is_refused_in_a_line(tmp_path, change, words):
  file = opened(tmp_path, {**small(LLAMA)[0], **change})
  with pytest.raises(IncompatibleError) as refused: vocabulary.tokenizer(file)
  line = str(refused.value)
  assert line.startswith(str(tmp_path)) and words in line and line.isprintable()


def test_more_tokens_than_rows_of_the_embedding_are_refused(tmp_path):
  metadata, tensors = small(LLAMA)
  with pytest.raises(IncompatibleError, match='261 tokens, and an embedding of 260'):
    vocabulary.read(opened(tmp_path, metadata, {'token_embd.weight': tensors['token_embd.weight'][:260]}))
