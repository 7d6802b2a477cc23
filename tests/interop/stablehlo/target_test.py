"""What is written says all that a reader needs to know, and what cannot be written is refused in one line."""
import json
import sys

import numpy as np
import pytest

from efficient_lm.config import fields
from efficient_lm.data import tokenizers
from efficient_lm.errors import ConfigError
from efficient_lm.interop import safetensors
from efficient_lm.interop.stablehlo import target
from efficient_lm.interop.stablehlo.target import StableHlo
from efficient_lm.models.spec import FloatCache, IntegerCache
from efficient_lm.tree import num_bytes
from tests.interop.stablehlo.models import INT4, TOKENIZER, drawn


def test_files_and_manifest(tmp_path):
  model = drawn('dense', INT4)
  notes = StableHlo(length=16, platforms=('cpu',)).write(model, TOKENIZER, str(tmp_path))
  assert {file.name for file in tmp_path.iterdir()} == {
    'prefill.stablehlo', 'decode.stablehlo', 'weights.safetensors', 'manifest.json', 'tokenizer.json', 'run.py'}
  assert all(note.endswith('.') for note in notes)
  manifest = json.loads((tmp_path / 'manifest.json').read_text())
  assert (manifest['length'], manifest['vocab_size'], manifest['platforms']) == (16, 27, ['cpu'])
  prefill, decode = manifest['programs']['prefill'], manifest['programs']['decode']
  assert prefill['arguments'] == [{'name': 'tokens', 'shape': ['batch', 'tokens'], 'dtype': 'int32'},
                                  {'name': 'lengths', 'shape': ['batch'], 'dtype': 'int32'}]
  assert prefill['results'] == decode['results'] and decode['results'][1:] == decode['arguments'][2:]
  assert prefill['results'][1] == {'name': 'cache/0/keys/x_BKSH', 'shape': [2, 'batch', 1, 16, 8], 'dtype': 'float32'}
  # Few bits stay few bits, and no weight is inside a program.
  stored = safetensors.read(tmp_path / 'weights.safetensors')
  assert list(stored) == [entry['name'] for entry in manifest['weights']]
  assert sum(np.prod(one.shape) * one.dtype.itemsize for one in stored.values()) == num_bytes(model)
  assert tokenizers.from_json((tmp_path / 'tokenizer.json').read_text()) == TOKENIZER


@pytest.mark.parametrize('one, field', [
  (StableHlo(length=0), 'length'), (StableHlo(platforms=()), 'platforms'), (StableHlo(platforms=('gpu',)), 'platforms'),
  (StableHlo(cache=IntegerCache(group=8)), 'cache'), (StableHlo(cache=IntegerCache(bits=3)), 'cache.bits')])
def test_wrong_settings_are_refused(one, field):
  with pytest.raises(ConfigError, match=f'^config.{field} = '): fields.check(one)


def test_defaults_are_right():
  fields.check(StableHlo())
  fields.check(StableHlo(cache=IntegerCache(bits=4), length=1))
  assert not [*target.check_cache(FloatCache())]


def test_without_flatbuffers(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, 'flatbuffers', None)
  with pytest.raises(ConfigError, match='pip install'): StableHlo().write(drawn('dense'), TOKENIZER, str(tmp_path))
  assert not [*tmp_path.iterdir()]
