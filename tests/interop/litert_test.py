"""LiteRT's own interpreter gives the numbers of the model: make check-litert, whose environment has its packages."""
import importlib.util
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_lm.config import fields
from efficient_lm.errors import ConfigError, IncompatibleError
from efficient_lm.formats import NF4, Float8, Group, Int
from efficient_lm.interop import litert
from efficient_lm.interop.litert import LiteRT
from efficient_lm.interop.stablehlo import programs
from efficient_lm.models.spec import FloatCache, IntegerCache
from efficient_lm.tree import num_bytes
from efficient_lm.weights.quantized import round_to_nearest
from efficient_lm.weights.quantizers import Rounding
from efficient_lm.weights.weight import Dense
from tests.interop.stablehlo.models import INT4, INT8, TOKENIZER, drawn, wide

MISSING = [name for name in ('litert_converter', 'ai_edge_litert') if importlib.util.find_spec(name) is None]
needs_packages = pytest.mark.skipif(bool(MISSING), reason=f'{", ".join(MISSING)} is not installed: make check-litert')
BATCH, PROMPT, LENGTH, STEPS = 2, 6, 16, 4
MODELS = {'dense': ('dense', None, FloatCache()), 'latent': ('latent', None, FloatCache()),
          'capped': ('capped', None, FloatCache()), 'int8, int8 cache': ('dense', INT8, IntegerCache(bits=8)),
          'int4': ('dense', INT4, FloatCache()), 'NF4': ('dense', NF4(scales=Group(size=8)), FloatCache())}


@needs_packages
@pytest.mark.parametrize('name', MODELS)
def test_the_interpreter_gives_the_numbers_of_the_model(tmp_path, name):
  """Each step from the cache that the interpreter itself has made: within 1e-5 of the largest logit."""
  from ai_edge_litert.interpreter import Interpreter
  kind, format, cache = MODELS[name]
  model = drawn(kind, format)
  LiteRT(batch=BATCH, prompt=PROMPT, length=LENGTH, cache=cache).write(model, TOKENIZER, str(tmp_path))
  manifest = json.loads((tmp_path / 'manifest.json').read_text())
  interpreter = Interpreter(model_path=str(tmp_path / 'model.tflite'))
  runners = {signature: interpreter.get_signature_runner(signature) for signature in ('prefill', 'decode')}
  sizes = programs.Sizes(BATCH, LENGTH, TOKENIZER.vocab_size, cache)
  own = programs.prefill(model, sizes, PROMPT), programs.decode_step(model, sizes)
  weights = [array for _, array in programs.weights_of(model)]
  tokens_BT = np.random.default_rng(1).integers(0, TOKENIZER.vocab_size, (BATCH, PROMPT + STEPS)).astype(np.int32)
  lengths_B = np.array([PROMPT, 3], np.int32)

  found = runners['prefill'](tokens=tokens_BT[:, :PROMPT], lengths=lengths_B)
  expected = jax.jit(own[0].run)(*weights, tokens_BT[:, :PROMPT], lengths_B)
  step, (first, *kept) = jax.jit(own[1].run), expected
  compare(found['logits'], first)
  slots = [entry['name'] for entry in manifest['signatures']['decode']['arguments'][2:]]
  for i in range(STEPS):
    given = dict(tokens=tokens_BT[:, PROMPT + i], starts=lengths_B + i)
    found = runners['decode'](**given, **{slot: found[slot] for slot in slots})
    first, *kept = step(*weights, *given.values(), *kept)
    compare(found['logits'], first)


def compare(found, expected):
  np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@needs_packages
def test_weights_are_stored_once_and_in_bytes(tmp_path):
  """Both signatures share them, and integers stay integers."""
  model = wide(INT8)
  LiteRT(prompt=4, length=8).write(model, TOKENIZER, str(tmp_path))
  size = (tmp_path / 'model.tflite').stat().st_size
  assert num_bytes(model) <= size <= num_bytes(model) + 100_000   # the operations and tables of positions


@pytest.mark.parametrize('format', [
  Int(bits=4, scales=Group(size=8), symmetric=False), Int(bits=3), NF4(scales=Group(size=8))])
def test_no_codes_share_a_byte_and_no_value_changes(format):
  before = round_to_nearest(Dense(jnp.asarray(np.random.default_rng(0).normal(size=(16, 8))), 'DF', 'D'), format)
  after = litert.in_bytes(before)
  np.testing.assert_array_equal(after.materialize(), before.materialize())
  assert after.axes == before.axes and after.inputs == before.inputs
  assert all(leaf.dtype != jnp.uint8 for leaf in jax.tree.leaves(after))


def test_eight_bits_stay_as_they_are():
  before = round_to_nearest(Dense(jnp.ones((16, 8)), 'DF', 'D'), INT8)
  assert litert.in_bytes(before) is before


def test_products_that_round_their_inputs_to_floats_are_refused():
  before = round_to_nearest(Dense(jnp.ones((16, 8)), 'DF', 'D'), Float8(), Rounding(format=Float8()))
  with pytest.raises(IncompatibleError, match='round their inputs'): litert.in_bytes(before)


def test_experts_are_refused():
  with pytest.raises(IncompatibleError, match='mixture'): litert.plain(drawn('experts'))


def test_files_that_would_be_too_large_are_refused(monkeypatch):
  monkeypatch.setattr(litert, 'LARGEST', 1000)
  with pytest.raises(IncompatibleError, match='holds less than 1,000'): litert.plain(drawn('dense'))


@pytest.mark.parametrize('one, field', [
  (LiteRT(batch=0), 'batch'), (LiteRT(prompt=9, length=8), 'prompt'), (LiteRT(cache=IntegerCache(bits=4)), 'cache'),
  (LiteRT(cache=IntegerCache(group=4)), 'cache')])
def test_wrong_settings_are_refused(one, field):
  with pytest.raises(ConfigError, match=f'^config.{field} = '): fields.check(one)


def test_without_the_converter(tmp_path, monkeypatch):
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(ConfigError, match='pip install'): LiteRT().write(drawn('dense'), TOKENIZER, str(tmp_path))
