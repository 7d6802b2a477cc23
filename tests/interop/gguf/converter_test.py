"""The converter of llama.cpp accepts folders that are written here, and makes the same model of them: `make check-hf`."""
import copy
import os
import pathlib
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from efficient_lm.interop import vocabulary
from efficient_lm.interop.gguf.source import Gguf
from efficient_lm.interop.huggingface import HuggingFace
from efficient_lm.interop.targets import HuggingFaceFolder
from efficient_lm.interop.targets.folder import save
from tests.interop.gguf.checkpoints import FIXTURES, for_engines

# It knows tokenizers by a hash, those of tests not: the name of one is put in its mouth, and nothing else.
CONVERT = """
import runpy, sys
root, *sys.argv = sys.argv[1], sys.argv[1] + '/convert_hf_to_gguf.py', *sys.argv[2:]
sys.path[:0] = [root, root + '/gguf-py']
from conversion import base
known = base.TextModel.get_vocab_base_pre
def name(self, tokenizer):
  try: return known(self, tokenizer)
  except NotImplementedError: return 'smollm'
base.TextModel.get_vocab_base_pre = name
runpy.run_path(sys.argv[0], run_name='__main__')
"""
# Gemma 2 is converted from tokenizer.model alone, which is not written here; Mistral's windows are not in its files.
NAMES = ('llama', 'smollm', 'llama3', 'llama_linear', 'qwen2', 'qwen3', 'qwen2_moe', 'qwen3_moe', 'olmoe', 'olmo2',
         'mixtral', 'gemma3_text', 'gpt2')


def converted(folder, out) -> Gguf:
  root = os.environ.get('LLAMA_CPP')
  if root is None: pytest.skip('LLAMA_CPP does not name its sources: make check-hf fetches them')
  pytest.importorskip('transformers')
  command = [sys.executable, '-c', CONVERT, os.path.abspath(root), str(folder), '--outtype', 'f32', '--outfile', str(out)]
  result = subprocess.run(command, capture_output=True, text=True)
  assert result.returncode == 0, result.stderr[-2000:]
  return Gguf(path=str(out))


def wide_enough(name: str, vocab_size: int) -> tuple[dict, dict]:
  """A checkpoint with as many rows as a tokenizer has ids, and GPT-2 with hidden units four times its width: the converter
  does not ask how many there are."""
  config, tensors = copy.deepcopy(for_engines(name))
  config['vocab_size'] = vocab_size
  for key, w in tensors.items():
    stem = key.split('.')[-2]
    if stem in ('embed_tokens', 'wte', 'lm_head'): tensors[key] = np.resize(w, (vocab_size, *w.shape[1:]))
    if stem == 'c_fc': tensors[key] = np.resize(w, (*w.shape[:-1], 4 * config['n_embd']))
    if stem == 'c_proj' and 'mlp' in key and w.ndim == 2: tensors[key] = np.resize(w, (4 * config['n_embd'], w.shape[1]))
  if 'n_inner' in config: config['n_inner'] = 4 * config['n_embd']
  return config, tensors


def logits(model, ids_BT) -> np.ndarray: return np.asarray(model(jnp.asarray(ids_BT)).logits_BTV)


@pytest.mark.parametrize('name', NAMES)
def test_it_makes_of_a_folder_the_model_that_was_written(name, tmp_path):
  tokenizer = vocabulary.read(str(FIXTURES / 'tokenizers' / 'bytes'))
  config, tensors = wide_enough(name, tokenizer.vocab_size)
  for folder in ('first', 'written'): (tmp_path / folder).mkdir()
  save(config, tensors.items(), tokenizer, str(tmp_path / 'first'))
  model = HuggingFace(path=str(tmp_path / 'first'), dtype='float32').load()
  HuggingFaceFolder().write(model, tokenizer, str(tmp_path / 'written'), 64)
  found = converted(tmp_path / 'written', tmp_path / 'model.gguf')
  ids_BT = np.random.default_rng(0).integers(0, tokenizer.vocab_size, (1, 24))
  np.testing.assert_array_equal(logits(found.load(), ids_BT), logits(model, ids_BT))


def test_it_makes_of_a_real_model_the_same_model_with_the_same_ids(smollm2, tmp_path):
  source = Gguf(path=smollm2, dtype='float32')
  HuggingFaceFolder().write(source.load(), source.tokenizer(), str(tmp_path), 64)
  found = converted(tmp_path, tmp_path / 'model.gguf')
  text = pathlib.Path(__file__).read_text()
  ids = found.tokenizer().encode(text)
  assert ids.tolist() == source.tokenizer().encode(text).tolist()
  np.testing.assert_array_equal(logits(found.load(), ids[None, :64]), logits(source.load(), ids[None, :64]))
