"""Small checkpoints of transformers as tests write them to GGUF, and matrices in few bits."""
import copy
import pathlib

import numpy as np

from efficient_lm.formats import MXFP4, Affine, Int, Ternary
from efficient_lm.interop import folder
from efficient_lm.interop.written import Stored
from efficient_lm.ops import packing

FIXTURES = pathlib.Path(__file__).parent.parent / 'fixtures'
PUBLISHED = {'rope_type': 'llama3', 'rope_theta': 5e5, 'factor': 32.0, 'low_freq_factor': 1.0, 'high_freq_factor': 4.0,
             'original_max_position_embeddings': 8192}
# What a file has no key for, as engines have it in their code.
IN_CODE = {'llama3': {'rope_parameters': PUBLISHED}, 'gemma2': {'query_pre_attn_scalar': 8, 'layer_types': None},
           'gemma3_text': {'query_pre_attn_scalar': 8, 'layer_types': None}}


def one_layer(config: dict, tensors: dict) -> tuple[dict, dict]:
  """The second layer as the only one: the first of this fixture has no experts, which files cannot say."""
  kept = {name.replace('layers.1.', 'layers.0.'): tensor for name, tensor in tensors.items() if 'layers.0.' not in name}
  return {**config, 'num_hidden_layers': 1, 'mlp_only_layers': []}, kept


def stored(name: str) -> tuple[dict, dict]:
  """The config and the tensors, in float32, of a fixture."""
  found = folder.read(str(FIXTURES / name))
  config, tensors = {**copy.deepcopy(dict(found.config)), **IN_CODE.get(name, {})}, found.tensors
  if name == 'qwen3_moe': config, tensors = one_layer(config, tensors)
  return config, {key: tensor.read().astype(np.float32) for key, tensor in tensors.items()}


def for_engines(name: str) -> tuple[dict, dict]:
  """As `stored`, where engines compute less than files can say: YaRN with the usual betas, and OLMoE with a head of keys for
  each of queries, here two of the same."""
  config, tensors = stored(name)
  if name == 'qwen3': config['rope_parameters'] |= {'beta_fast': 32.0, 'beta_slow': 1.0}
  if name == 'olmoe':
    dim, config['num_key_value_heads'] = config['hidden_size'] // 4, 4
    twice = lambda x: np.repeat(x.reshape(2, dim, *x.shape[1:]), 2, 0).reshape(4 * dim, *x.shape[1:])
    places = ('k_proj.weight', 'v_proj.weight', 'k_norm.weight')
    tensors = {key: twice(tensor) if key.endswith(places) else tensor for key, tensor in tensors.items()}
  return config, tensors


def in_few_bits(w_OI, format, encoded=None) -> Stored:
  """A matrix rounded to nearest, or as it is encoded already, as models hand it out."""
  w_OI = np.asarray(w_OI, np.float32)
  encoded = encoded or format.encode(w_OI, format.scales_for(w_OI))
  codes = packing.unpack(encoded.values, format.bits)
  numbers = np.asarray(codes if isinstance(format, Int | Ternary | Affine) else format.numbers(codes))
  whole = lambda x: None if x is None else np.repeat(np.asarray(x, np.float32), len(w_OI) // x.shape[0], 0)
  return Stored(numbers, *map(whole, format.steps(encoded.scales)), format)


E2M1 = np.array([0, .5, 1, 1.5, 2, 3, 4, 6, 0, -.5, -1, -1.5, -2, -3, -4, -6], np.float32)


def drawn(shape: tuple[int, int], format, seed: int = 0) -> Stored:
  """A matrix of any numbers of a symmetric format or of Affine, with scales in its `scale_dtype`."""
  rng, (n, q) = np.random.default_rng(seed), format.scales.counts(*shape)
  step = rng.uniform(1, 2, (n, q)).astype(format.scale_dtype).astype(np.float32).repeat(shape[0] // n, 0) / 256
  if isinstance(format, MXFP4):
    return Stored(E2M1[rng.integers(0, 16, shape)], np.exp2(np.round(np.log2(step))), None, format)
  if isinstance(format, Affine):
    return Stored(rng.integers(-8, 8, shape).astype(np.int8), step, -step * np.float32(8), format)
  most = int(format.largest)
  return Stored(rng.integers(-most, most + 1, shape).astype(np.int8), step, None, format)
