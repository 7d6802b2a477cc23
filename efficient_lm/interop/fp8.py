"""Weights in fp8 with a scale for each block of a matrix, as DeepSeek-V3 and the FP8 models of Qwen3 are published.

A matrix `x.weight` of float8_e4m3fn has a companion `x.weight_scale_inv`, float32, one number for each block of
`weight_block_size` rows and columns: the weight is their product (DeepSeek-V3, arXiv:2412.19437, section 3.3.2). Here it is
multiplied out in float32 and rounded to the dtype that config.json names, as the publisher's own conversion does, when it is
read. Engines that compute in fp8 round activations too; models here do not.
"""
import dataclasses
import json

import ml_dtypes
import numpy as np

from efficient_lm.errors import CheckpointError
from efficient_lm.interop.checkpoint import Checkpoint, Tensor
from efficient_lm.interop.families.keys import Keys

CONFIG, SCALES = 'quantization_config', '_scale_inv'


def is_fp8(config) -> bool:
  """Whether a config.json says that weights are of this kind."""
  said = config.get(CONFIG)
  return isinstance(said, dict) and said.get('quant_method') == 'fp8'


def without(config: dict) -> dict:
  """The config of the same model in floats."""
  return {key: value for key, value in config.items() if key != CONFIG} if is_fp8(config) else config


def dequantized(checkpoint: Checkpoint) -> Checkpoint:
  """The same checkpoint in floats, each matrix multiplied out when it is read; itself, where it is in floats already. Raises
  ConfigError for blocks that are not understood, CheckpointError for scales that do not fit."""
  if not is_fp8(checkpoint.config): return checkpoint
  block, dtype = _block(checkpoint), _dtype(checkpoint.config)
  found = {}
  for name, tensor in checkpoint.tensors.items():
    if name.endswith('.weight' + SCALES): continue
    scales = checkpoint.tensors.get(name + SCALES)
    found[name] = tensor if scales is None else _product(checkpoint.where, name, tensor, scales, block, dtype)
  return dataclasses.replace(checkpoint, config=without(dict(checkpoint.config)), tensors=found)


def _block(checkpoint: Checkpoint) -> tuple[int, int]:
  keys = Keys(checkpoint.config, checkpoint.where).table(CONFIG)
  keys.only('fmt', None, 'e4m3')
  keys.only('scale_fmt', None, 'float')
  keys.only('expert_dtype', None, 'fp8')
  keys.only('activation_scheme', 'dynamic', default='dynamic')
  keys.asked |= {'quant_method', 'modules_to_not_convert', 'modules_to_convert', 'ignored_layers', 'dequantize'}
  block = keys.listed('weight_block_size', int, [128, 128])
  if len(block) != 2 or min(block) < 1: keys.refuse('weight_block_size', 'two whole numbers are needed')
  keys.finish()
  return tuple(block)


def _dtype(config) -> np.dtype:
  name = config.get('dtype') or config.get('torch_dtype') or 'bfloat16'
  return np.dtype(getattr(ml_dtypes, name, np.float32) if name == 'bfloat16' else name)


def _product(where: str, name: str, tensor: Tensor, scales: Tensor, block: tuple[int, int], dtype) -> Tensor:
  needed = tuple(-(-size // part) for size, part in zip(tensor.shape, block))
  fits = len(tensor.shape) == 2 and scales.shape == needed
  if not fits or (tensor.dtype, scales.dtype) != (ml_dtypes.float8_e4m3fn, np.float32):
    said = json.dumps([str(tensor.dtype), tensor.shape, str(scales.dtype), scales.shape])
    raise CheckpointError(f'{where}: {name} and its {SCALES.strip("_")} are no fp8 matrix in blocks of {block}: {said}')

  def fetch() -> np.ndarray:
    stored, factors, product = tensor.read(), scales.read(), np.empty(tensor.shape, dtype)
    for i, row in enumerate(factors):   # a block of rows at a time: float32 of all of them would be four times the file
      rows = slice(i * block[0], (i + 1) * block[0])
      product[rows] = stored[rows].astype(np.float32) * np.repeat(row, block[1])[:tensor.shape[1]]
    return product
  return Tensor(tensor.shape, dtype, fetch)
