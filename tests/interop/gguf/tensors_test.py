"""Names and orders of GGUF are the inverse of those that are read: writer_test states it of whole models."""
import numpy as np
import pytest

from efficient_lm.errors import ConfigError
from efficient_lm.formats import Group, Int
from efficient_lm.interop.gguf import names, tensors
from efficient_lm.interop.gguf.config import ARCHITECTURES
from tests.interop.gguf.checkpoints import in_few_bits

CONFIG = {'num_attention_heads': 4, 'num_key_value_heads': 2}
LLAMA = ARCHITECTURES['llama']


def test_neighbours_are_halves_again():
  rows = np.arange(24 * 3).reshape(24, 3)
  for heads in (1, 2, 3):
    np.testing.assert_array_equal(names.halves(tensors.neighbours(rows, heads), heads), rows)
  np.testing.assert_array_equal(tensors.neighbours(np.arange(8), 2), [0, 2, 1, 3, 4, 6, 5, 7])


@pytest.mark.parametrize('symmetric', [True, False])
def test_rows_in_few_bits_move_with_their_scales(symmetric):
  w_OI = np.random.default_rng(0).normal(size=(16, 64))
  stored = in_few_bits(w_OI, Int(bits=4, symmetric=symmetric, scales=Group(size=32)))
  (found,) = tensors.named({'model.layers.3.self_attn.q_proj.weight': stored}, CONFIG, LLAMA)
  assert found.name == 'blk.3.attn_q.weight' and found.shape == (16, 64)
  np.testing.assert_array_equal(found.parts[0].dequantized(), tensors.neighbours(stored.dequantized(), 4))


def test_experts_are_joined_in_the_order_of_their_numbers():
  """Ten and two, not as text is ordered."""
  given = {f'model.layers.0.block_sparse_moe.experts.{e}.w2.weight': np.full((2, 3), e) for e in (10, 2, 0)}
  (found,) = tensors.named(given, CONFIG, LLAMA)
  assert found.name == 'blk.0.ffn_down_exps.weight' and found.shape == (3, 2, 3) and not found.plain
  assert [part[0, 0] for part in found.parts] == [0, 2, 10]


def test_what_engines_want_in_32_bits_is_known():
  given = {'model.norm.weight': np.ones(4), 'model.layers.0.mlp.gate.weight': np.ones((2, 4)),
           'model.embed_tokens.weight': np.ones((8, 4))}
  assert [one.plain for one in tensors.named(given, CONFIG, LLAMA)] == [True, True, False]


@pytest.mark.parametrize('name', ['model.layers.0.attn.weight', 'model.layers.0.mlp.experts.0.w4.weight', 'visual.weight'])
def test_a_name_without_a_place_is_refused(name):
  with pytest.raises(ConfigError, match='has no place in a GGUF file'):
    list(tensors.named({name: np.ones(2)}, CONFIG, LLAMA))


def test_a_tied_head_is_written_once():
  given = {'model.embed_tokens.weight': np.ones((8, 4)), 'lm_head.weight': np.ones((8, 4))}
  assert [one.name for one in tensors.named(given, {**CONFIG, 'tie_word_embeddings': True}, LLAMA)] == ['token_embd.weight']
  assert len(list(tensors.named(given, CONFIG, LLAMA))) == 2
