"""A GGUF file wherever a model may come from."""
import dataclasses

import jax
import numpy as np
import pytest

from efficient_lm import commands
from efficient_lm.config import fields
from efficient_lm.config.sources import is_source
from efficient_lm.errors import CheckpointError, ConfigError
from efficient_lm.interop.gguf import source
from efficient_lm.interop.gguf.source import Gguf
from efficient_lm.models import decode
from tests.interop.gguf import writing
from tests.interop.gguf.models import LLAMA, small


@pytest.fixture
def path(tmp_path) -> str:
  file = tmp_path / 'small.gguf'
  file.write_bytes(writing.file(*small(LLAMA)))
  return str(file)


def test_it_is_a_source_that_a_config_can_hold(path):
  found = Gguf(path=path, dtype='bfloat16')
  assert is_source(found) and found.here and not list(found.check())
  assert found.label == f'{path}, computed in bfloat16' and found.context == 64
  assert found.spec() == dataclasses.replace(Gguf(path=path).spec(), dtype='bfloat16')
  assert fields.from_json(fields.to_json(found)) == found
  assert [problem[0] for problem in Gguf(path='', dtype='int8').check()] == ['path', 'dtype']


def test_its_arrays_are_those_of_the_file(path):
  """A model that is held in 16 bits is the same, rounded."""
  _, tensors = small(LLAMA)
  model, abstract = Gguf(path=path).load(), Gguf(path=path).abstract()
  kinds = lambda tree: [(jax.tree_util.keystr(path), a.shape, a.dtype) for path, a in jax.tree.leaves_with_path(tree)]
  assert kinds(model) == kinds(abstract)
  np.testing.assert_array_equal(model.embed.materialize(), tensors['token_embd.weight'])
  up_LDF = np.stack([tensors[f'blk.{i}.ffn_up.weight'].T for i in range(2)])
  np.testing.assert_array_equal(model.stacks[0].blocks.mlp.up.materialize(), up_LDF)
  half = Gguf(path=path, parameters='float16').load().stacks[0].blocks.mlp.up.materialize()
  assert half.dtype == np.float16
  np.testing.assert_array_equal(half, up_LDF.astype(np.float16))


def test_the_only_file_of_a_folder_is_meant(path, tmp_path):
  assert source.file_of(str(tmp_path)) == path
  assert Gguf(path=str(tmp_path)).key() == Gguf(path=path).key()
  (tmp_path / 'other.gguf').write_bytes(b'GGUF')
  assert source.file_of(str(tmp_path)) is None and not Gguf(path=str(tmp_path)).here
  with pytest.raises(ConfigError, match='neither a GGUF file nor a folder with one'): Gguf(path=str(tmp_path)).spec()


def test_a_file_of_another_name_is_known_by_how_it_begins(path, tmp_path):
  (tmp_path / 'sha256-1').write_bytes(writing.file(*small(LLAMA)))
  (tmp_path / 'text').write_text('GGU')
  assert Gguf(path=str(tmp_path / 'sha256-1')).here and not Gguf(path=str(tmp_path / 'text')).here


def test_a_key_is_that_of_the_content(path, tmp_path):
  metadata, tensors = small(LLAMA)
  key = Gguf(path=path).key()
  assert key != Gguf(path=path, parameters='float16').key()
  changes = [({**metadata, 'llama.rope.freq_base': 1e4}, tensors), ({**metadata, 'tokenizer.ggml.pre': 'smollm'}, tensors),
             (metadata, {**tensors, 'blk.1.ffn_up.weight': tensors['blk.1.ffn_up.weight'] * 2})]
  for i, changed in enumerate(changes):
    other = tmp_path / f'{i}.gguf'
    other.write_bytes(writing.file(*changed))
    assert Gguf(path=str(other)).key() != key


@pytest.fixture
def run(monkeypatch):
  """run(path): the source that --run=path names."""
  def call(path, **words):
    given = {'run': path, 'stage': None, 'packed': False, 'config': None, **words}
    monkeypatch.setattr(commands, 'FLAGS', type('Words', (), given))
    return commands.run_source()
  return call


def test_run_may_name_a_file_or_a_folder_with_one(path, tmp_path, run):
  assert run(path) == Gguf(path=path) and run(str(tmp_path)) == Gguf(path=str(tmp_path))
  with pytest.raises(ConfigError, match='only runs have stages'): run(path, stage=1)
  (tmp_path / 'small.gguf').write_bytes(b'GGUF')
  with pytest.raises(CheckpointError, match=r'small\.gguf'): run(path)


WRITTEN = (", the city of Nova Haven was a thriving metropolis, with towering skyscrapers and bustling streets. But as the "
           "years went by, the city began to lose its original essence. The once-blue skies of")


@pytest.mark.usefixtures('patient')
def test_the_model_that_is_fetched_writes_what_it_writes_in_transformers(smollm2):
  """transformers 5.24 from the same file, greedily and in float32: two prompts of other lengths in one batch."""
  found = Gguf(path=smollm2)
  tokenizer, model = found.tokenizer(), found.load()
  prompts = [tokenizer.prompt('Once upon a time'), tokenizer.prompt('The capital of France is')]
  drawn = decode.stream(model, prompts, 40, sampling=decode.Sampling(0.0), vocab_size=tokenizer.vocab_size)
  first, second = np.concatenate(list(drawn), 1)
  assert tokenizer.decode(first) == WRITTEN and tokenizer.decode(second).startswith(' Paris.')


def test_the_model_that_is_fetched_is_described_and_reads_text(smollm2):
  """`make smollm2`: SmolLM2 135M, its matrices in blocks of four bits."""
  found = Gguf(path=smollm2)
  model, tokenizer = found.spec(), found.tokenizer()
  assert (model.dim, model.vocab_size, model.stacks[0].num_layers, model.tied) == (576, 49152, 30, True)
  # 'How' and 'are' are words of it; <|im_start|> is letters in a text.
  assert tokenizer.encode('How are you?').tolist() == [2020, 359, 346, 47] and 1 not in tokenizer.encode('<|im_start|>')
  assert (tokenizer.bos, tokenizer.eod, tokenizer.stops) == (None, 2, (2, 0))
