"""compressed-tensors: what is packed stands for the numbers that the model multiplies by, bit for bit."""
import pathlib

import jax
import numpy as np
import pytest

from efficient_lm.data.tokenizers import ByteTokenizer
from efficient_lm.errors import IncompatibleError
from efficient_lm.formats import MXFP4, Block, Channel, Float8, FullRangeInt, Group, Int
from efficient_lm.interop import folder, write
from efficient_lm.interop.huggingface import HuggingFace
from efficient_lm.interop.parity import logits_of
from efficient_lm.interop.targets import CompressedTensors
from efficient_lm.interop.targets.folder import transformers_logits
from efficient_lm.tree import rewrite
from efficient_lm.weights.biased import beneath
from efficient_lm.weights.layout import matrix_shape
from efficient_lm.weights.quantized import Quantized, round_to_nearest
from efficient_lm.weights.quantizers import Rounding
from efficient_lm.weights.weight import Dense, Weight

pytestmark = pytest.mark.usefixtures('quick_compilation')   # nearly all of their time is compiling
FIXTURES = pathlib.Path(__file__).parent.parent / 'fixtures'
LAYERS = r'attention|mlp/(gate|up|down)|experts'
SCHEMES = {'W4A16': (Int(bits=4, scales=Group(size=8)), None), 'W4A16 by rows': (FullRangeInt(scales=Channel()), None),
           'W8A8': (Int(), Int()), 'W8A16': (Int(), None), 'FP8': (Float8(), Float8())}


def quantized(name: str, format, tokens=None, where: str = LAYERS):
  model = HuggingFace(path=str(FIXTURES / name), dtype='float32').load()
  few = jax.jit(lambda weight: round_to_nearest(weight, format.fitted(*matrix_shape(weight)), tokens and Rounding(tokens)))
  return rewrite(model, Weight, lambda _, weight: beneath(weight, few), where)


def plain(model):
  return rewrite(model, Quantized, lambda _, weight: Dense(weight.materialize(), weight.axes, weight.inputs))


def unpacked(tensors, module: str) -> np.ndarray:
  """The matrix of a module, as the documentation of compressed-tensors says it."""
  scale = tensors[f'{module}.weight_scale'].read().astype(np.float32)
  if f'{module}.weight_packed' in tensors:
    words = tensors[f'{module}.weight_packed'].read().view(np.uint32)
    shape = tensors[f'{module}.weight_shape'].read()
    codes = np.stack([(words >> 4 * i) & 15 for i in range(8)], -1).reshape(shape).astype(np.float32) - 8
  else: codes = tensors[f'{module}.weight'].read().astype(np.float32)
  return (codes.reshape(*scale.shape, -1) * scale[..., None]).reshape(codes.shape)


@pytest.mark.thinned
@pytest.mark.parametrize(('name', 'scheme'), [('mixtral', 'W4A16'), *(('llama3', scheme) for scheme in SCHEMES)])
def test_what_is_written_stands_for_what_the_model_multiplies_by(name, scheme, tmp_path):
  model = quantized(name, *SCHEMES[scheme])
  CompressedTensors().write(model, ByteTokenizer(), str(tmp_path), 64)
  checkpoint = folder.read(str(tmp_path))
  settings, tensors = checkpoint.config['quantization_config'], checkpoint.tensors
  (group,) = settings['config_groups'].values()
  assert (group['input_activations'] is not None) == (SCHEMES[scheme][1] is not None)
  floats = write.written(plain(model)).tensors
  modules = {tensor.rpartition('.')[0] for tensor in tensors if tensor.endswith('.weight_scale')}
  for module in modules: np.testing.assert_array_equal(unpacked(tensors, module), floats[f'{module}.weight'])
  named = [tensor for tensor, array in floats.items() if array.ndim == 2 and 'embed' not in tensor]
  matrices = {tensor.removesuffix('.weight') for tensor in named}
  assert modules | set(settings['ignore']) == matrices | {'lm_head'} and not modules & set(settings['ignore'])


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('name', ('llama', 'qwen2', 'opt', 'gemma3_text'))
@pytest.mark.parametrize('scheme', ('W4A16', 'W8A8', 'FP8'))
def test_transformers_computes_from_it_what_the_dequantized_model_does(name, scheme, tmp_path):
  pytest.importorskip('transformers')
  pytest.importorskip('compressed_tensors')
  model, tokens_BT = quantized(name, *SCHEMES[scheme]), np.load(FIXTURES / name / 'expected.npz')['tokens_BT']
  CompressedTensors().write(model, ByteTokenizer(), str(tmp_path), 64)
  ours, theirs = logits_of(plain(model), tokens_BT), CompressedTensors().read(str(tmp_path), tokens_BT)
  # Weights are equal bit for bit; sums are in another order: 6.4e-7 was the largest seen.
  assert np.linalg.norm(theirs - ours) < 2e-6 * np.linalg.norm(ours)


def their_tokens(scheme: str):
  """A hook of torch that rounds what a module reads, (..., I), token by token, as compressed-tensors does."""
  import torch
  def rounded(_, inputs):
    (x,) = inputs
    largest = x.abs().amax(-1, keepdim=True) if x.ndim == 3 else x.abs().max()   # OPT has joined its sequences
    if scheme == 'W8A8': return torch.clamp(torch.round(x / (scale := largest / 127.5)), -128, 127) * scale
    return (x / (scale := largest / 448)).to(torch.float8_e4m3fn).to(x.dtype) * scale
  return rounded


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('name', ('llama', 'qwen2', 'opt', 'gemma3_text'))
@pytest.mark.parametrize('scheme', ('W8A8', 'FP8'))
def test_an_engine_that_rounds_tokens_in_its_own_way_differs_by_that_alone(name, scheme, tmp_path):
  """Without `dequantize` transformers rounds tokens too. From the weights that the test above compares with ours, and its
  rounding beside them, the same logits come out, bit for bit. (Against ours it cannot be said: the largest number of a token
  lies half-way between two codes by its rounding, and a last bit of it decides.)"""
  pytest.importorskip('transformers')
  pytest.importorskip('compressed_tensors')
  model, tokens_BT = quantized(name, *SCHEMES[scheme]), np.load(FIXTURES / name / 'expected.npz')['tokens_BT']
  CompressedTensors().write(model, ByteTokenizer(), str(tmp_path), 64)
  modules = [tensor.removesuffix('.weight_scale') for tensor in folder.read(str(tmp_path)).tensors if '_scale' in tensor]
  hooks = dict.fromkeys(modules, their_tokens(scheme))
  emulated = CompressedTensors().read(str(tmp_path), tokens_BT, hooks)
  np.testing.assert_array_equal(transformers_logits(str(tmp_path), tokens_BT), emulated)


def test_several_formats_are_refused(tmp_path):
  model = quantized('llama', Int(bits=4, scales=Group(size=8)), None, 'attention/output|mlp/down')
  model = rewrite(model, Dense, lambda _, weight: round_to_nearest(weight, Int()), 'attention|mlp')
  with pytest.raises(IncompatibleError, match='in different formats'):
    CompressedTensors().write(model, ByteTokenizer(), str(tmp_path), 64)


@pytest.mark.parametrize(('format', 'tokens', 'where', 'words'), [
  (Int(bits=3), None, LAYERS, 'int3 per channel, which no scheme'),
  (Int(bits=4, scales=Group(size=8), symmetric=False), None, LAYERS, 'with zero point'),
  (Int(scales=Block(outputs=8, inputs=8)), None, LAYERS, 'no scheme'), (MXFP4(), None, 'mlp/down', 'no scheme'),
  (Int(), Int(bits=4), LAYERS, 'its tokens are rounded to int4'),
  (Int(), None, 'attention/query', 'engines join them into one'),
  (Int(), None, 'embed', 'no matrix of the layers is in few bits'),
], ids=lambda value: getattr(value, 'name', str(value)[:12]))
def test_what_the_library_does_not_say_is_refused_in_a_line(format, tokens, where, words, tmp_path):
  model = quantized('gemma2', format, tokens, where)
  with pytest.raises(IncompatibleError) as caught: CompressedTensors().write(model, ByteTokenizer(), str(tmp_path), 64)
  assert words in str(caught.value) and '\n' not in str(caught.value)
