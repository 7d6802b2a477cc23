import dataclasses
import json
import pathlib
import random
import subprocess
import sys

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from efficient_lm.data import BPE, ByteTokenizer, SymbolTokenizer, packing
from efficient_lm.data.tokenizers import BytePairs, from_json
from efficient_lm.errors import ConfigError
from efficient_lm.interop import vocabulary

CORPUS = [b'def the_function(argument):\n  return the_function(argument)\n' * 3, 'déjà vu, 漢字\n'.encode() * 5,
          b'<|endoftext|> \xff\xfe broken \x80 bytes']
FOREIGN = pathlib.Path(__file__).parent.parent / 'interop' / 'fixtures' / 'tokenizers'
STORED = pathlib.Path(__file__).with_name('stored_bpe.json')  # as it was written before documents began with a mark


@pytest.fixture(scope='module', name='bpe')
def _bpe():
  pytest.importorskip('tokenizers')
  return BPE(320).fit(CORPUS, 'some corpus')


@pytest.fixture(scope='module', name='stored')
def _stored():
  pytest.importorskip('tokenizers')
  return from_json(STORED.read_text())


@pytest.fixture(params=['bytes', 'bpe', 'stored'], name='tokenizer')
def _tokenizer(request):
  return ByteTokenizer() if request.param == 'bytes' else request.getfixturevalue(request.param)


@hypothesis.settings(deadline=None, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
@hypothesis.given(content=st.one_of(st.binary(), st.text().map(str.encode), st.sampled_from(CORPUS)))
def test_every_document_survives_the_round_trip(tokenizer, content):
  ids = tokenizer.encode(content)
  assert ids.dtype == np.int32
  assert tokenizer.decode_bytes(ids) == content
  assert tokenizer.decode(ids) == content.decode('utf-8', 'replace')
  assert tokenizer.bytes_V[ids].sum() == len(content)
  assert (ids >= 0).all() and (ids < tokenizer.vocab_size).all() and not (ids == tokenizer.eod).any()


def test_documents_at_once_are_documents_one_by_one(tokenizer):
  for one, ids in zip(CORPUS, tokenizer.encode_all(CORPUS)): np.testing.assert_array_equal(ids, tokenizer.encode(one))


def test_text_and_its_bytes_are_the_same(tokenizer):
  np.testing.assert_array_equal(tokenizer.encode('é'), tokenizer.encode('é'.encode()))


def test_the_end_of_a_document_is_the_last_id_and_stands_for_no_text(tokenizer):
  assert tokenizer.eod == tokenizer.vocab_size - 1 and tokenizer.stops == (tokenizer.eod,)
  assert tokenizer.bytes_V.shape == (tokenizer.vocab_size,) and tokenizer.bytes_V.dtype == np.int32
  assert tokenizer.bytes_V[tokenizer.eod] == 0
  assert tokenizer.decode([tokenizer.eod]) == ''


def test_one_mark_begins_and_ends_documents_unless_the_tokenizer_is_older(bpe, stored):
  for tokenizer in (ByteTokenizer(), bpe): assert tokenizer.bos == tokenizer.eod
  for tokenizer in (from_json('{"kind": "bytes"}'), stored, SymbolTokenizer()): assert tokenizer.bos is None


@pytest.mark.parametrize('text', ['', 'the', b'\xff', 'é'])
def test_a_prompt_is_the_text_as_a_document_begins(bpe, text):
  for tokenizer in (ByteTokenizer(), bpe):
    prompt = tokenizer.prompt(text)
    assert prompt.dtype == np.int32 and prompt.tolist() == [tokenizer.bos, *tokenizer.encode(text)]
    content = text if isinstance(text, bytes) else text.encode()
    assert packing.pack(tokenizer, [content]).tokens.tolist() == [*prompt, tokenizer.eod]


def test_without_a_mark_an_empty_prompt_is_refused(stored):
  for tokenizer in (ByteTokenizer(None), stored, SymbolTokenizer('abc')):
    assert tokenizer.prompt('a').tolist() == tokenizer.encode('a').tolist()
    with pytest.raises(ValueError, match='empty'): tokenizer.prompt('')


def test_saved_and_made_again(tokenizer):
  again = from_json(tokenizer.to_json())
  assert again.key == tokenizer.key and again.vocab_size == tokenizer.vocab_size
  assert (again.bos, again.eod, again.stops) == (tokenizer.bos, tokenizer.eod, tokenizer.stops)
  for document in CORPUS: np.testing.assert_array_equal(again.encode(document), tokenizer.encode(document))


@pytest.mark.parametrize('tokenizer', [SymbolTokenizer('ab'), SymbolTokenizer('ba'), ByteTokenizer(), ByteTokenizer(None)])
def test_saved_and_made_again_is_equal(tokenizer):
  again = from_json(tokenizer.to_json())
  assert again == tokenizer and again.key == tokenizer.key


def test_the_key_is_the_same_for_what_encodes_alike_and_for_nothing_else(bpe, stored):
  model = json.loads(bpe.model)
  marks = {'bos': bpe.bos, 'eod': bpe.eod}
  made = lambda model, size=bpe.vocab_size, **changes: BytePairs(json.dumps(model), size, **marks | changes)
  # Spelled otherwise: the same words learned from another corpus, in another order, and as older versions wrote them.
  vocabulary, merges = model['model']['vocab'], model['model']['merges']
  alike = [BPE(320).fit([*CORPUS], 'under another name'), from_json(bpe.to_json()),
           made(model | {'model': model['model'] | {'vocab': dict(reversed(vocabulary.items()))}}),
           made(model | {'model': model['model'] | {'merges': [' '.join(pair) for pair in merges]}}),
           made(model | {'model': {name: value for name, value in model['model'].items() if value is not None}}),
           made(model | {'decoder': None}), made(model, stops=(7,)), made(model, bpe.vocab_size + 5)]
  for other in alike: assert other.key == bpe.key and other.encode(CORPUS[0]).tolist() == bpe.encode(CORPUS[0]).tolist()
  swapped = vocabulary | {'a': vocabulary['b'], 'b': vocabulary['a']}
  others = [made(model | {'model': model['model'] | {'vocab': swapped}}), made(model, bos=None),
            made(model, bpe.vocab_size + 1, eod=bpe.vocab_size), BPE(300).fit(CORPUS, 'some corpus'), stored,
            made(model | {'pre_tokenizer': json.loads(stored.model)['pre_tokenizer']}),
            made(model | {'model': model['model'] | {'merges': [merges[1], merges[0], *merges[2:]]}})]
  everything = [bpe, *others, ByteTokenizer(), ByteTokenizer(None), SymbolTokenizer('ab'), SymbolTokenizer('ba')]
  assert len({tokenizer.key for tokenizer in everything}) == len(everything)


@pytest.mark.parametrize('bad', [
  '', '[]', '{}', '{"kind": "other"}', '{"kind": "bpe", "vocab_size": 9, "model": {}}', '{"kind": "bytes", "bos": 3}',
  '{"kind": "symbols", "symbols": "aa"}'])
def test_what_is_no_tokenizer_is_refused_in_one_line(bad):
  with pytest.raises(ConfigError) as error: from_json(bad)
  assert '\n' not in str(error.value)


def test_bytes_are_themselves():
  assert ByteTokenizer().encode('aé').tolist() == [97, 195, 169]
  assert ByteTokenizer().decode([97, 195]) == 'a\N{REPLACEMENT CHARACTER}'
  assert [field for field, _, _ in ByteTokenizer(0).check()] == ['bos'] and not list(ByteTokenizer(None).check())


def test_symbols_are_numbered_in_order():
  tokenizer = SymbolTokenizer('abX')
  assert tokenizer.encode('Xab').tolist() == [2, 0, 1] and tokenizer.decode([2, 0, 1]) == 'Xab'
  assert tokenizer.vocab_size == 3 and tokenizer.bytes_V.tolist() == [1, 1, 1]
  assert tokenizer.eod is None and tokenizer.stops == ()
  with pytest.raises(ValueError, match="b'c'"): tokenizer.encode('abc')
  for bad in ('', 'a', 'aa', 'aé'): assert list(SymbolTokenizer(bad).check())


def test_merges_shorten_what_was_learned(bpe):
  assert len(bpe.encode(CORPUS[0])) < len(CORPUS[0]) / 3
  assert all(index < bpe.eod for index in bpe.encode(CORPUS[0]))


def pieces(tokenizer, text):
  """What is encoded on its own."""
  return [piece for piece, _ in tokenizer._encoder.pre_tokenizer.pre_tokenize_str(text)]


@pytest.mark.parametrize('unit', ['ab1-', 'x', '漢', ' ', '\n', '-', '7', "'s", '\U0001f600'])
def test_the_work_is_linear_in_the_length_of_a_line(unit):
  """Learning from a piece, and merging in it, takes at most the square of its length: pieces do not grow with the line."""
  tokenizers = pytest.importorskip('tokenizers')
  line = unit * (200_000 // len(unit))
  tokenizer = BPE(300).fit([line.encode()[:20_000]], f'a line of {unit}')
  lengths = {}
  for size in (len(line) // 2, len(line)):
    cut = pieces(tokenizer, line[:size])
    joined = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(line[:size])
    assert ''.join(cut) == joined[0][0]  # nothing is lost
    lengths[size] = len(cut)
    assert max(map(len, cut)) <= 65 * 4  # 64 characters and the space before a word, four bytes each at most
  assert lengths[len(line)] <= 2 * lengths[len(line) // 2] + 2
  assert max(tokenizer.bytes_V) <= 65 * 4


@hypothesis.settings(deadline=None)
@hypothesis.given(text=st.text(max_size=64) | st.lists(st.sampled_from(
  ["it's", " don't", ' the', '  two', '\n\n', ' 123', '4', '!?', ' —', 'é', '漢字', '\t'])).map(''.join))
def test_short_words_are_those_of_gpt_2(bpe, stored, text):
  hypothesis.assume(all(len(piece) <= 64 for piece in pieces(stored, text)))
  assert pieces(bpe, text) == pieces(stored, text)


def test_a_stored_tokenizer_encodes_as_it_did(stored):
  """By the package alone, from the stored model."""
  encoder = pytest.importorskip('tokenizers').Tokenizer.from_str(json.dumps(json.loads(STORED.read_text())['model']))
  for text in ('def the_function(x):\n    return   the_argument\n', 'a' * 1000, ' ' * 1000 + 'x', 'déjà 漢字'):
    assert stored.encode(text).tolist() == encoder.encode(text).ids
  # Ids and stream of the code that stored it.
  assert stored.encode(b'the_argument tion').tolist() == [265, 62, 267, 270, 220, 83, 269]
  stream = packing.pack(stored, [b'the', b'tion'])
  assert stream.tokens.tolist() == [265, 271, 83, 269, 271] and stream.starts.tolist() == [0, 2]
  assert not stream.shared_mark


def changed(bpe, **parts):
  return json.dumps(json.loads(bpe.model) | parts)


def test_what_would_change_text_is_refused(bpe):
  model = json.loads(bpe.model)
  nfc, lower = {'type': 'NFC'}, {'type': 'Lowercase'}
  spaced = {'type': 'ByteLevel', 'add_prefix_space': True, 'trim_offsets': True, 'use_regex': True}
  without_a = {piece: index for piece, index in model['model']['vocab'].items() if piece != 'X'}
  for bad in ({'normalizer': nfc}, {'normalizer': lower}, {'pre_tokenizer': spaced}, {'pre_tokenizer': None},
              {'pre_tokenizer': {'type': 'Whitespace'}}, {'model': model['model'] | {'dropout': 0.5}},
              {'model': model['model'] | {'vocab': without_a}}):
    with pytest.raises(ValueError): BytePairs(changed(bpe, **bad), 320, bos=319, eod=319)
    saved = json.loads(bpe.to_json())
    with pytest.raises(ConfigError): from_json(json.dumps(saved | {'model': saved['model'] | bad}))
  for marks in ({'bos': 97, 'eod': 319}, {'bos': 319, 'eod': 320}, {'bos': -1, 'eod': 319}):
    with pytest.raises(ValueError): BytePairs(bpe.model, 320, **marks)
  with pytest.raises(ValueError): BytePairs(bpe.model, 256, bos=None, eod=None)


def test_no_text_encodes_to_a_mark(bpe):
  """Even where a document spells one, and where the model would cut, pad or add marks by itself."""
  added = [{'id': 318, 'content': '<|begin|>', 'single_word': False, 'lstrip': False, 'rstrip': False, 'normalized': False,
            'special': True}]
  template = {'type': 'TemplateProcessing', 'pair': [{'Sequence': {'id': 'A', 'type_id': 0}}],
              'single': [{'SpecialToken': {'id': '<|begin|>', 'type_id': 0}}, {'Sequence': {'id': 'A', 'type_id': 0}}],
              'special_tokens': {'<|begin|>': {'id': '<|begin|>', 'ids': [318], 'tokens': ['<|begin|>']}}}
  truncation = {'direction': 'Right', 'max_length': 3, 'strategy': 'LongestFirst', 'stride': 0}
  padding = {'strategy': {'Fixed': 99}, 'direction': 'Right', 'pad_to_multiple_of': None, 'pad_id': 0, 'pad_type_id': 0,
             'pad_token': 'a'}
  smaller = BPE(318).fit(CORPUS, 'some corpus')
  model = changed(smaller, added_tokens=added, post_processor=template, truncation=truncation, padding=padding)
  tokenizer = BytePairs(model, 320, bos=318, eod=319, stops=(318, 319))
  for text in ('<|begin|>', 'some text <|begin|> and more', ''):
    ids = tokenizer.encode(text)
    assert not {318, 319} & set(ids.tolist()) and tokenizer.decode(ids) == text
    assert ids.tolist() == smaller.encode(text).tolist()
  assert tokenizer.bytes_V[[318, 319]].tolist() == [0, 0]
  again = from_json(tokenizer.to_json())
  assert (again.bos, again.eod, again.stops, again.key) == (318, 319, (318, 319), tokenizer.key)
  a, b = again.encode('ab')
  assert packing.pack(again, [b'a', b'b']).tokens.tolist() == [318, a, 319, 318, b, 319]


def test_a_mark_may_be_one_of_the_ids_of_the_model(bpe):
  """As a vocabulary that is read from elsewhere has it; no merging makes it, and a mark with a space is a mark too."""
  bare, ids = json.loads(bpe.model)['model'], {'<|end|>': 318, '<the end>': 317}
  whole = lambda **more: changed(bpe, model=bare | {'vocab': bare['vocab'] | ids} | more)
  assert max(bare['vocab'].values()) < 317
  tokenizer = BytePairs(whole(), 319, bos=None, eod=318, stops=(318, 317))
  assert BytePairs(whole(), 319, bos=317, eod=318).bytes_V[[317, 318]].tolist() == [0, 0]
  for text in ('<|end|>', 'the function <|end|> returns'):
    assert tokenizer.encode(text).tolist() == bpe.encode(text).tolist() and tokenizer.decode(tokenizer.encode(text)) == text
  again = from_json(tokenizer.to_json())
  assert (again.eod, again.stops, again.key) == (318, (318, 317), tokenizer.key)
  made = next(iter(bare['merges']))
  made = bare['vocab'][''.join(made.split(' ') if isinstance(made, str) else made)]
  for mark, model in ((97, whole()), (made, whole()), (318, whole(ignore_merges=True))):
    with pytest.raises(ValueError, match='does not fit'): BytePairs(model, 319, bos=317, eod=mark)


def test_learning_is_deterministic_across_processes(bpe, tmp_path):
  """Whatever the seed of hashes, the number of threads and the order of what counts alike."""
  code = ('from efficient_lm.data import BPE; from tests_corpus import CORPUS; import sys;'
          'sys.stdout.write(BPE(320).fit(CORPUS, "x").to_json())')
  (tmp_path / 'tests_corpus.py').write_text(f'CORPUS = {CORPUS!r}')
  for home, threads in (('a', '1'), ('b', '4')):
    environment = {'EFFICIENT_LM_CACHE': str(tmp_path / home), 'PYTHONHASHSEED': str(ord(home)),
                   'RAYON_NUM_THREADS': threads, 'PYTHONPATH': ':'.join([str(tmp_path), *sys.path])}
    learned = subprocess.check_output([sys.executable, '-c', code], env=environment, text=True)
    assert learned == bpe.to_json()


def test_it_is_learned_once_for_a_corpus_and_its_settings(monkeypatch):
  pytest.importorskip('tokenizers')
  calls = []
  learn = BPE._learn
  monkeypatch.setattr(BPE, '_learn', lambda self, documents: calls.append(self) or learn(self, documents))
  for settings_, corpus in ((BPE(300), 'one'), (BPE(300), 'one'), (BPE(301), 'one'), (BPE(300), 'two')):
    settings_.fit(CORPUS, corpus)
  assert calls == [BPE(300), BPE(301), BPE(300)]


def test_a_small_vocabulary_is_refused_and_a_small_corpus_is_not():
  assert [(field, value) for field, value, _ in BPE(256).check()] == [('vocab_size', 256)]
  pytest.importorskip('tokenizers')
  for size in (257, 5000):
    tokenizer = BPE(size).fit([b'ab'], f'tiny {size}')
    assert tokenizer.vocab_size == size and tokenizer.decode_bytes(tokenizer.encode(b'\x00ab')) == b'\x00ab'
    assert json.loads(tokenizer.to_json())['vocab_size'] == size


def test_what_a_config_names_is_compared_by_value():
  assert ByteTokenizer() == ByteTokenizer(256) != ByteTokenizer(None)
  assert dataclasses.replace(BPE(300), train_bytes=9) != BPE(300)


VALUES = (None, True, -1, 0, 2 ** 31, 10 ** 30, 1.5, '', 'x', '\0', 'a' * 1000, [], {}, [[]], '\ud800', '(', '(a+)+$', 'BPE')


def places(value, path=()):
  """Of everything in JSON that is below its top; of long lists and tables the beginning."""
  if path: yield path
  inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
  for name, each in list(inner)[:40]: yield from places(each, (*path, name))


def damaged(saved, rng):
  """With one to three entries left out, or something else in their places."""
  saved = json.loads(json.dumps(saved))
  for path in rng.choices(list(places(saved)), k=rng.choice((1, 1, 2, 3))):
    holder = saved
    for name in path[:-1]:
      holder = holder[name] if isinstance(holder, (dict, list)) and (
        name in holder if isinstance(holder, dict) else name < len(holder)) else {}
    if not isinstance(holder, (dict, list)) or (isinstance(holder, list) and path[-1] >= len(holder)): continue
    if rng.random() < 0.3 and (isinstance(holder, list) or path[-1] in holder): del holder[path[-1]]
    else: holder[path[-1]] = rng.choice(VALUES)
  return saved


def test_a_damaged_tokenizer_is_refused_in_a_line_or_gives_ids_that_it_has(bpe):
  rng, ends = random.Random(0), set()
  foreign = [vocabulary.read(str(FOREIGN / name)) for name in ('bytes', 'pieces', 'bytes_bos')]
  saved = [json.loads(one.to_json()) for one in (bpe, ByteTokenizer(), SymbolTokenizer(), *foreign)]
  for _ in range(400):
    text = json.dumps(damaged(rng.choice(saved), rng))
    try: made = from_json(text)
    except ConfigError as error:
      assert '\n' not in str(error) and len(str(error)) < 400
      ends.add('refused')
      continue
    for given in ('Hello wörld 漢字 \0', b'\xff\xfe', b'', b'ab' * 500):
      try: ids = made.encode(given)
      except ValueError: continue   # of symbols there are few
      assert not len(ids) or 0 <= ids.min() <= ids.max() < made.vocab_size
      made.decode_bytes(ids)
    assert from_json(made.to_json()).key == made.key
    ends.add('read')
  assert ends == {'refused', 'read'}


@pytest.mark.parametrize('entry', [{'vocab_size': 2 ** 31}, {'vocab_size': True}, {'prefix': 'a' * 1000}])
def test_what_the_package_could_not_bear_is_refused_before(bpe, entry):
  saved = json.loads(bpe.to_json())
  if 'prefix' in entry: saved['model']['model']['continuing_subword_prefix'] = entry['prefix']
  else: saved |= entry
  with pytest.raises(ConfigError): from_json(json.dumps(saved))
