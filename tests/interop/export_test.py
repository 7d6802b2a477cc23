"""Exports as a stage: whole or not at all, and the model goes on as it was."""
import dataclasses
import importlib.util
import json
import pathlib
import runpy

import jax
import numpy as np
import optax
import pytest
from flax import nnx

from efficient_lm.config import presets
from efficient_lm.data.tokenizers import ByteTokenizer
from efficient_lm.errors import ConfigError, IncompatibleError
from efficient_lm.interop.export import Export, export
from efficient_lm.interop.huggingface import HuggingFace
from efficient_lm.interop.targets import CompressedTensors, GgufFile, HuggingFaceFolder
from efficient_lm.models import spec
from efficient_lm.techniques import Lora, NofM, Pack, PruneOnce, Quantize
from efficient_lm.training import learner
from efficient_lm.training.learner import new_model
from efficient_lm.tree import rewrite
from efficient_lm.weights.low_rank import LowRank

FIXTURES = pathlib.Path(__file__).parent / 'fixtures'
GIVEN = dict(source='llama', length=64, tokens_BT=np.arange(8)[None], text='numbers')


@dataclasses.dataclass
class Broken(HuggingFaceFolder):
  def write(self, model, tokenizer, out, length=2048):
    (pathlib.Path(out) / 'half').write_text('half')
    raise OSError('disk full')


def test_a_folder_appears_as_a_whole_or_not_at_all(tmp_path):
  model, out = HuggingFace(path=str(FIXTURES / 'llama')).load(), tmp_path / 'out'
  with pytest.raises(OSError, match='disk full'): export(Broken(), model, ByteTokenizer(), str(out), **GIVEN)
  assert not list(tmp_path.iterdir())
  export(HuggingFaceFolder(), model, ByteTokenizer(), str(out), **GIVEN)
  files = {path.name: path.read_bytes() for path in out.iterdir()}
  assert {'config.json', 'model.safetensors', 'parity.json', 'README.md'} <= set(files)
  assert len(list(tmp_path.iterdir())) == 1
  with pytest.raises(ConfigError, match='is there already'):
    export(HuggingFaceFolder(), model, ByteTokenizer(), str(out), **GIVEN)
  with pytest.raises(OSError, match='disk full'): export(Broken(), model, ByteTokenizer(), str(out), replace=True, **GIVEN)
  assert {path.name: path.read_bytes() for path in out.iterdir()} == files


def test_what_is_no_target_is_refused():
  fields = lambda stage: [field for field, _, _ in stage.check()]
  assert fields(Export(to='hf')) == ['to'] and fields(Export(path='')) == ['path'] and not fields(Export())


def test_figures_name_their_engine_or_say_that_there_is_none(tmp_path):
  model = HuggingFace(path=str(FIXTURES / 'llama')).load()
  *_, last = export(HuggingFaceFolder(), model, ByteTokenizer(), str(tmp_path / 'out'), **GIVEN)
  found = json.loads((tmp_path / 'out' / 'parity.json').read_text())
  assert found['engine'] == 'transformers' and found['text'] == 'numbers' and found['model'] == 'llama'
  if importlib.util.find_spec('transformers') is None: assert found['parity'] is None and 'Not compared' in last
  else: assert found['parity']['relative_difference'] < 1e-6 and 'transformers computes logits' in last


@pytest.mark.parametrize(('kind', 'target'), [('gptq', GgufFile()), ('mixed', GgufFile()), ('awq', CompressedTensors())])
def test_what_the_configs_of_ptq_make_is_written_as_it_is(kind, target, tmp_path):
  """Groups and scales are those of other engines' files: nothing is refused, and nothing is rounded again."""
  config = runpy.run_path(str(pathlib.Path(__file__).parents[2] / 'configs' / 'quantized.py'))['get_config'](kind)
  model = new_model(presets.dense().model, jax.random.key(0))
  for stage in config.stages:
    model = stage.to_nearest(model) if isinstance(stage, Quantize) else stage(model, None)[0]
  notes = target.write(model, ByteTokenizer(), str(tmp_path), 256)
  assert not [note for note in notes if 'rounded' in note or 'moved' in note]


@pytest.mark.parametrize('target', [HuggingFaceFolder(), CompressedTensors(), GgufFile()], ids=str)
def test_a_model_that_no_family_says_is_refused_before_anything_is_trained(target):
  """From shapes alone."""
  attention = spec.GroupedQuery(num_heads=4, num_kv_heads=2, head_dim=8, qk_norm='H', biases=('query', 'output'))
  stack = spec.Stack(num_layers=1, attention=attention, mlp=spec.SwiGLU(hidden=16))
  described = lambda stack: spec.Transformer(vocab_size=16, dim=32, stacks=(stack,))
  shapes = lambda stack: jax.eval_shape(lambda: described(stack).build(rngs=nnx.Rngs(0)))
  with pytest.raises(IncompatibleError, match='no family'): jax.eval_shape(Export(to=target).abstract, shapes(stack))
  plain = dataclasses.replace(stack, attention=dataclasses.replace(attention, biases=()))
  jax.eval_shape(Export(to=target).abstract, shapes(plain))


@pytest.mark.parametrize('made', ['adapted', 'packed', 'pruned and packed'])
def test_adapters_are_merged_and_packed_zeros_unpacked(made, tmp_path):
  """What others read is the matrix that is multiplied."""
  model = new_model(presets.dense().model, jax.random.key(0))
  if made == 'adapted':
    model = learner.assemble(model, optax.sgd(0.1), (Lora(rank=2),), jax.random.key(0)).model
    more = lambda up: up.replace(up.get_value() + 0.1)
    model = rewrite(model, LowRank, lambda _, weight: LowRank(weight.inner, weight.down, more(weight.up), weight.scale))
  else:
    pattern = dict(pattern=NofM()) if made == 'packed' else dict(sparsity=0.5)
    model, _ = Pack()(PruneOnce(**pattern)(model, None)[0], None)
  HuggingFaceFolder().write(model, ByteTokenizer(), str(tmp_path), 64)
  ids_BT = np.arange(24).reshape(2, 12)
  found = HuggingFace(path=str(tmp_path)).load()
  wanted = np.asarray(model(ids_BT).logits_BTV)
  np.testing.assert_allclose(found(ids_BT).logits_BTV, wanted, rtol=0, atol=2e-5 * np.abs(wanted).max())
