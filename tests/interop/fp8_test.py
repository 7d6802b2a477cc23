"""Blocks of fp8; that a whole model of them computes what transformers computes is in families_test."""
import json
import pathlib

import ml_dtypes
import numpy as np
import pytest

from efficient_lm.errors import CheckpointError, ConfigError
from efficient_lm.interop import fp8
from efficient_lm.interop.checkpoint import Checkpoint, Tensor
from efficient_lm.interop.huggingface import HuggingFace

FIXTURE = pathlib.Path(__file__).parent / 'fixtures' / 'deepseek_v3_fp8'
SAID = {'quant_method': 'fp8', 'activation_scheme': 'dynamic', 'weight_block_size': [4, 3]}


def checkpoint(said=SAID, dtype='float32', shape=(10, 7), **changes) -> Checkpoint:
  rng = np.random.default_rng(0)
  arrays = {'a.weight': rng.normal(size=shape).astype(ml_dtypes.float8_e4m3fn), 'norm.weight': np.ones(7, np.float32),
            'a.weight_scale_inv': rng.uniform(1, 2, (3, 3)).astype(np.float32)} | changes
  tensors = {name: Tensor.of(array) for name, array in arrays.items()}
  return Checkpoint({'dtype': dtype, 'quantization_config': said}, tensors)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_every_number_is_multiplied_by_the_scale_of_its_block(dtype):
  """Blocks at the edges may be smaller."""
  given = checkpoint(dtype=dtype)
  found = fp8.dequantized(given)
  assert set(found.tensors) == {'a.weight', 'norm.weight'} and 'quantization_config' not in found.config
  stored, scales = (given.tensors[name].read() for name in ('a.weight', 'a.weight_scale_inv'))
  wanted = [[np.float32(stored[i, j]) * scales[i // 4, j // 3] for j in range(7)] for i in range(10)]
  weight = found.tensors['a.weight']
  assert weight.read().dtype == weight.dtype == np.dtype(getattr(ml_dtypes, dtype, dtype))
  np.testing.assert_array_equal(weight.read(), np.array(wanted, np.float32).astype(weight.dtype))


def test_a_checkpoint_in_floats_is_itself():
  floats = Checkpoint({'dtype': 'float32'}, {})
  assert fp8.dequantized(floats) is floats and fp8.without(floats.config) is floats.config


@pytest.mark.parametrize('changes', [
  {'a.weight_scale_inv': np.ones((3, 2), np.float32)}, {'a.weight': np.ones((10, 7), np.int8)},
  {'a.weight_scale_inv': np.ones((3, 3), np.float16)}])
def test_scales_that_do_not_fit_are_a_line(changes):
  with pytest.raises(CheckpointError, match='and its scale_inv are no fp8 matrix in blocks'):
    fp8.dequantized(checkpoint(**changes))


@pytest.mark.parametrize('changes', [{'weight_block_size': [0, 3]}, {'weight_block_size': 128}, {'fmt': 'e5m2'},
                                     {'activation_scheme': 'static'}, {'scale_fmt': 'ue8m0'}, {'more': 1}])
def test_blocks_of_other_kinds_are_refused_by_their_key(changes):
  with pytest.raises(ConfigError) as caught: fp8.dequantized(checkpoint(SAID | changes))
  assert f'quantization_config.{next(iter(changes))} = ' in str(caught.value)


def test_other_quantizations_are_refused(tmp_path):
  config = json.loads((FIXTURE / 'config.json').read_text())
  assert HuggingFace(path=str(FIXTURE)).spec().dtype == 'float32'
  (tmp_path / 'config.json').write_text(json.dumps(config | {'quantization_config': {'quant_method': 'awq'}}))
  with pytest.raises(ConfigError, match='save the model dequantized'): HuggingFace(path=str(tmp_path)).spec()
