"""llama.cpp opens what is written, and computes what this library computes: `make check-gguf`, which builds it."""
import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_lm.data.tokenizers import ByteTokenizer
from efficient_lm.formats import MXFP4, Group, Int, Ternary
from efficient_lm.interop import vocabulary
from efficient_lm.interop.gguf import names, writer
from efficient_lm.interop.gguf.source import Gguf
from efficient_lm.interop.gguf.writer import GgufFile
from efficient_lm.interop.written import Written
from efficient_lm.models import layers
from tests.interop.gguf.checkpoints import FIXTURES, for_engines, in_few_bits

pytest.importorskip('llama_cpp', reason='llama-cpp-python is not installed: make check-gguf builds it, 10 minutes of a core')

# Logits up to 17 of models whose sums both compute in float32, in other orders: 7e-6 was the largest difference seen.
TOLERANCE = 1e-4
# Its GELU is read from a table of float16, at an argument rounded to float16. With the same roundings here 2.3e-4 is left,
# of arguments that lie on either side of a boundary: 2^-11 of them. Without, 3e-3.
GELU, TABLE = ('gemma2', 'gemma3_text', 'gpt2'), 1e-3
# No characters that NFC composes: llama.cpp does not compose any, whatever the tokenizer did.
TEXTS = ['', 'Hello, world!  two  spaces', "DON'T we'll", 'é 漢字 \U0001f600\n\n\ttab', 'x = [1, 22, 333]; 4567',
         'camelCase HTTPServer', '\u200b …—"quoted" ¿qué?', '<|endoftext|> <s> </s>']
HALF = dict(scale_dtype='float16')


def answered(path, ids, texts=()) -> dict:
  """What llama.cpp says."""
  return writer.asked_of_llama_cpp(str(path), [int(one) for one in ids], texts)


def ours(path, ids) -> np.ndarray:
  return np.asarray(Gguf(path=str(path)).load()(jnp.asarray(ids)[None]).logits_BTV)[0]


def from_table(activation, x):
  """As engines read GELU."""
  half = lambda one: one.astype(jnp.float16).astype(jnp.float32)
  return jnp.where(x <= -10, 0, jnp.where(x >= 10, x, half(activation(half(x)))))


@pytest.mark.parametrize('name', ['llama', 'smollm', 'llama3', 'llama_linear', 'qwen2', 'qwen3', 'qwen2_moe', 'qwen3_moe',
                                  'olmoe', 'olmo2', 'mixtral', *GELU])
def test_it_computes_the_logits_of_a_file_in_float32(tmp_path, name, monkeypatch):
  """At once and token by token, past the original length of scaled positions."""
  path = tmp_path / 'model.gguf'
  GgufFile().save(Written(*for_engines(name)), None, path)
  monkeypatch.setitem(layers.ACTIVATIONS, 'gelu_tanh', functools.partial(from_table, layers.ACTIVATIONS['gelu_tanh']))
  found = Gguf(path=str(path))
  ids = np.random.default_rng(0).integers(0, found.spec().vocab_size, min(48, found.context))
  said, wanted = answered(path, ids), ours(path, ids)
  bound = TABLE if name in GELU else TOLERANCE
  for kind in ('logits', 'steps'): np.testing.assert_allclose(said[kind], wanted, rtol=0, atol=bound)


D, V, LAYERS = 256, 257, 2


def model_of(format=None) -> Written:
  """A Llama of random weights, its projections in few bits."""
  rng, scale = np.random.default_rng(0), D ** -0.5
  config = {'model_type': 'llama', 'architectures': ['LlamaForCausalLM'], 'hidden_size': D, 'intermediate_size': 2 * D,
            'num_attention_heads': 4, 'num_key_value_heads': 2, 'num_hidden_layers': LAYERS, 'vocab_size': V,
            'tie_word_embeddings': True, 'max_position_embeddings': 128, 'rms_norm_eps': 1e-5, 'rope_theta': 1e4}
  shapes = {'self_attn.q_proj': (D, D), 'self_attn.k_proj': (D // 2, D), 'self_attn.v_proj': (D // 2, D),
            'self_attn.o_proj': (D, D), 'mlp.gate_proj': (2 * D, D), 'mlp.up_proj': (2 * D, D), 'mlp.down_proj': (D, 2 * D)}
  tensors = {'model.embed_tokens.weight': rng.normal(size=(V, D)) * 4 * scale, 'model.norm.weight': np.ones(D)}
  for i in range(LAYERS):
    tensors |= {f'model.layers.{i}.{name}.weight': rng.normal(size=shape) * scale for name, shape in shapes.items()}
    tensors |= {f'model.layers.{i}.{name}.weight': np.ones(D) for name in ('input_layernorm', 'post_attention_layernorm')}
  few = lambda name, w: in_few_bits(w, format) if format and 'proj' in name else w.astype(np.float32)
  return Written(config, {name: few(name, w) for name, w in tensors.items()})


def kl(ours_TV, said_TV) -> float:
  """Nats a token, of what llama.cpp says to what is computed here."""
  p, q = (jax.nn.log_softmax(jnp.asarray(x, jnp.float32)) for x in (ours_TV, said_TV))
  return float(jnp.mean(jnp.sum(jnp.exp(p) * (p - q), -1)))


@pytest.mark.parametrize('format, target', [
  (Int(**HALF), GgufFile()), (Int(bits=4, scales=Group(size=32), **HALF), GgufFile()),
  (Int(bits=4, symmetric=False, scales=Group(size=32), **HALF), GgufFile()), (MXFP4(), GgufFile()),
  (Ternary(**HALF), GgufFile()), (Ternary(**HALF), GgufFile(ternary='TQ1_0')),
  (None, GgufFile(floats='float16')), (None, GgufFile(floats='bfloat16'))], ids=lambda one: getattr(one, 'name', str(one)))
def test_it_reads_the_weights_of_a_file_in_few_bits(tmp_path, format, target, record_property):
  """It rounds what blocks are multiplied with to 8 bits (1.4e-3 nats was the most seen; ternary blocks of a matrix of one
  scale 1e-9), and to 16 bits before floats of 16 (1e-4): KL shows that, and no more than that."""
  path, ids = tmp_path / 'model.gguf', np.random.default_rng(1).integers(0, V, 64)
  target.save(model_of(format), ByteTokenizer(), path)
  found = kl(ours(path, ids), answered(path, ids)['logits'])
  record_property('kl', found)
  print(f'{format.name if format else target.floats}: KL {found:.1e} nats a token')
  assert found < (5e-3 if format else 5e-4)


@pytest.mark.parametrize('name', ['bytes', 'bytes_bos', 'pieces', 'pieces_bare', 'single'])
def test_it_finds_the_ids_of_a_tokenizer(tmp_path, name):
  path = tmp_path / 'model.gguf'
  tokenizer = ByteTokenizer() if name == 'single' else vocabulary.read(str(FIXTURES / 'tokenizers' / name))
  model = model_of()
  rows = np.resize(model.tensors['model.embed_tokens.weight'], (tokenizer.vocab_size, D))
  model = dataclasses.replace(model, config={**model.config, 'vocab_size': len(rows)},
                              tensors={**model.tensors, 'model.embed_tokens.weight': rows})
  GgufFile().save(model, tokenizer, path)
  said = answered(path, [1, 2], TEXTS)
  for text, ids in zip(TEXTS, np.split(said['tokens'], said['ends'][:-1]), strict=True):
    assert ids.tolist() == tokenizer.encode(text).tolist(), text


def test_a_real_model_is_computed_and_its_text_read(tmp_path, smollm2):
  """SmolLM2 135M, read from blocks of 4 bits and written in float32; its tokenizer is written anew as well. Sums of 1536
  numbers in 30 layers: 2e-6 of the largest logit was seen."""
  source, path = Gguf(path=smollm2), tmp_path / 'model.gguf'
  checkpoint, tokenizer = names.checkpoint(source.file), source.tokenizer()
  model = Written(checkpoint.config, {name: tensor.read() for name, tensor in checkpoint.tensors.items()})
  assert GgufFile().save(model, tokenizer, path) == ()
  texts = [*TEXTS, pathlib.Path(__file__).read_text()]
  ids = tokenizer.encode(texts[-1])[:64]
  said, wanted = answered(path, ids, texts), ours(path, ids)
  np.testing.assert_allclose(said['logits'], wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())
  for text, found in zip(texts, np.split(said['tokens'], said['ends'][:-1]), strict=True):
    assert found.tolist() == tokenizer.encode(text).tolist(), text
