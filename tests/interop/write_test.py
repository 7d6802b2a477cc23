"""A model on its way out: what comes back is the same model, bit for bit, and what no family says is refused."""
import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_lm.compression.shape import Shape
from efficient_lm.data.tokenizers import ByteTokenizer
from efficient_lm.errors import IncompatibleError
from efficient_lm.formats import MXFP4, Block, Channel, Float8, Group, Int, MidRise, Ternary
from efficient_lm.interop import families, write
from efficient_lm.interop.folder import read
from efficient_lm.interop.huggingface import HuggingFace
from efficient_lm.interop.targets import HuggingFaceFolder
from efficient_lm.interop.written import Stored
from efficient_lm.models import spec, zoo
from efficient_lm.models.described import alike, described
from efficient_lm.models.moe import routing
from efficient_lm.models.transformer import unrolled
from efficient_lm.techniques import Magnitude
from efficient_lm.techniques.pruning.shrink import Shrink
from efficient_lm.tree import path_name, rewrite
from efficient_lm.weights.fake_quantized import Normalized
from efficient_lm.weights.layout import matrix_shape
from efficient_lm.weights.masked import Masked
from efficient_lm.weights.quantized import Quantized, round_to_nearest
from efficient_lm.weights.rotated import Rotated
from efficient_lm.weights.weight import Dense
from tests.compressing import Context

pytestmark = pytest.mark.usefixtures('quick_compilation')   # nearly all of their time is compiling
FIXTURES = pathlib.Path(__file__).parent / 'fixtures'
NAMES = sorted(path.parent.name for path in FIXTURES.glob('*/expected.npz'))
SPELLINGS = (('rope_parameters',), ('rope_theta', 'rope_scaling', 'rope_local_base_freq'))


def build(one: spec.Transformer, seed: int = 0):
  return one.build(rngs=nnx.Rngs(params=seed))


def leaves(tree) -> dict:
  return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def assert_same(one, other):
  one, other = leaves(one), leaves(other)
  assert set(one) == set(other)
  for path, leaf in one.items():
    assert leaf.dtype == other[path].dtype, path
    np.testing.assert_array_equal(leaf, other[path], path)


@pytest.mark.parametrize('name', NAMES)
def test_what_is_written_is_read_again_bit_for_bit(name, tmp_path):
  source = HuggingFace(path=str(FIXTURES / name))
  model = source.load()
  assert HuggingFaceFolder().write(model, ByteTokenizer(), str(tmp_path), 64) == ()
  again = HuggingFace(path=str(tmp_path))
  assert again.spec() == source.spec()
  assert_same(again.load(), model)
  old, new = read(str(FIXTURES / name)), read(str(tmp_path))
  assert new.config['model_type'] == old.config['model_type']
  assert set(new.tensors) == {tensor for tensor in old.tensors if not tensor.endswith('_scale_inv')}


@pytest.mark.parametrize('name', [name for name in NAMES if name not in ('gpt2', 'opt')])
def test_each_spelling_of_a_config_says_all_of_it(name):
  """A reader that knows one spelling alone must not fall back to a default."""
  config = dict(write.written(HuggingFace(path=str(FIXTURES / name)).load(), 64).config)
  whole = families.spec_of(config)
  for left_out in SPELLINGS:
    less = {key: value for key, value in config.items() if key not in left_out}
    if name == 'gemma3_text' and left_out == SPELLINGS[0]: less['layer_types'] = config['layer_types']
    assert families.spec_of(less) == whole
  for left_out in ('dtype', 'torch_dtype'):
    assert families.spec_of({key: value for key, value in config.items() if key != left_out}) == whole


def test_stacks_that_are_taken_apart_are_written_as_the_stack_is():
  model = HuggingFace(path=str(FIXTURES / 'gemma2')).load()
  one, other = write.written(model), write.written(unrolled(model))
  assert one.config == other.config and list(one.tensors) == list(other.tensors)
  for name, tensor in one.tensors.items(): np.testing.assert_array_equal(tensor, other.tensors[name])


@pytest.mark.parametrize(('name', 'shape'), [
  ('gemma2', Shape(layers=0.6)), ('gemma3_text', Shape(layers=0.6)), ('qwen2_window', Shape(layers=0.5)),
  ('llama3', Shape(width=0.5, multiple=8, kv_heads=0.5)), ('mixtral', Shape(experts=0.5))])
def test_what_was_made_smaller_is_written_with_a_config_of_its_own_sizes(name, shape, tmp_path):
  """Layers are listed by kind in some configs, and counted in all."""
  model, _ = Shrink(to=shape, scores=(Magnitude(),))(HuggingFace(path=str(FIXTURES / name)).load(), Context())
  assert HuggingFaceFolder().write(model, ByteTokenizer(), str(tmp_path), 64) == ()
  again = HuggingFace(path=str(tmp_path)).load()
  assert alike(described(unrolled(again))) == alike(described(unrolled(model)))
  one, other = write.written(model, 64), write.written(again, 64)
  assert one.config == other.config
  assert len(one.config.get('layer_types') or described(model).layers) == one.config['num_hidden_layers']
  assert set(one.tensors) == set(other.tensors)
  for path, tensor in one.tensors.items(): np.testing.assert_array_equal(tensor, other.tensors[path], path)


def test_floats_are_written_in_the_dtype_that_is_asked_for():
  written = write.written(HuggingFace(path=str(FIXTURES / 'llama')).load(), dtype='bfloat16')
  assert {tensor.dtype for tensor in written.tensors.values()} == {jnp.dtype('bfloat16')}


SMALL = spec.GroupedQuery(num_heads=2, num_kv_heads=1, head_dim=32)


def small(mlp=None, attention=SMALL, **changes) -> spec.Transformer:
  stack = spec.Stack(num_layers=1, attention=attention, mlp=mlp or spec.SwiGLU(hidden=32))
  return spec.Transformer(vocab_size=8, dim=32, stacks=(stack,), **changes)


FORMATS = [Int(), Int(bits=4, scales=Group(size=8)), Int(bits=4, scales=Group(size=16), symmetric=False), Int(bits=3),
           Int(bits=2, scales=Channel()), MidRise(bits=4), Ternary(), Float8(), MXFP4(),
           Int(scales=Block(outputs=8, inputs=8))]


@pytest.mark.thinned
@pytest.mark.parametrize('format', FORMATS, ids=lambda format: format.name)
def test_what_is_stored_leaves_as_its_numbers_and_scales_and_stands_for_the_same_floats(format):
  """Experts, which are pruned as well, and a matrix of attention."""
  model = build(small(zoo.experts(3, 2, 32)))

  def stored(path, weight):
    weight = jax.jit(round_to_nearest, static_argnums=1)(weight, format.fitted(*matrix_shape(weight)))
    if 'experts' not in path: return weight
    return Masked(weight, jax.random.bernoulli(jax.random.key(0), 0.5, weight.shape))
  model = rewrite(model, Dense, stored, where='attention/output|experts/down')
  dense = jax.jit(lambda weight: Dense(weight.materialize(), weight.axes, weight.inputs))
  plain = rewrite(model, (Masked, Quantized), lambda _, weight: dense(weight))
  few, floats = write.written(model).tensors, write.written(plain).tensors
  assert {isinstance(tensor, Stored) for name, tensor in few.items() if 'o_proj' in name or 'w2' in name} == {True}
  for name, tensor in few.items():
    if not isinstance(tensor, Stored): continue
    assert tensor.numbers_OI.dtype == (np.int8 if type(format) in (Int, Ternary) else np.float32)
    np.testing.assert_array_equal(tensor.dequantized(), floats[name], name)


def test_rotated_weights_are_rotated_back_and_said():
  model = build(small())
  inverse = lambda weight: Dense(Rotated(weight, 32).materialize(), weight.axes, weight.inputs)   # its own
  rotated = rewrite(model, Dense, lambda _, weight: Rotated(round_to_nearest(inverse(weight), Int()), 32), where='mlp/down')
  written = write.written(rotated)
  name = 'model.layers.0.mlp.down_proj.weight'
  assert 'rotated back' in written.notes[0] and len(written.notes) == 1
  np.testing.assert_allclose(written.tensors[name], write.written(model).tensors[name], atol=0.01)   # a step of 8 bits


def refused(one: spec.Transformer, words: str):
  with pytest.raises(IncompatibleError) as caught: write.written(build(one))
  assert words in str(caught.value) and '\n' not in str(caught.value)


def test_a_model_that_no_family_says_is_refused_with_what_the_nearest_differs_in():
  attention = lambda **changes: small(attention=dataclasses.replace(SMALL, **changes))
  refused(attention(softcap=3.0), 'attention.softcap = None instead of 3.0')
  refused(attention(rope=spec.Rope(layout='interleaved')), 'rope.layout = half instead of interleaved')
  refused(attention(rope=None), 'no family of Hugging Face computes what this model does')
  refused(small(spec.MoE(num_experts=4, hidden=32, router=routing.ExpertChoice(capacity=2))), 'no family of Hugging Face')
  refused(small(spec.Gated(hidden=32, activation='relu', biases=('up',))), 'biases')


def test_a_weight_whose_product_does_more_is_refused_by_its_path():
  model = build(small())
  model = rewrite(model, Dense, lambda _, weight: Normalized(weight), where='mlp/down')
  with pytest.raises(IncompatibleError, match='mlp/down: a weight with Normalized'): write.written(model)


def test_the_capacity_of_experts_is_left_out_and_that_is_said():
  written = write.written(build(small(zoo.experts(4, 2, 32, capacity=1.25))))
  assert written.config['model_type'] == 'mixtral' and 'no token is dropped elsewhere' in written.notes[0]


def test_an_upcycled_model_is_written_as_the_mixture_that_it_is():
  from efficient_lm.compression.experts import upcycled
  mixture = lambda hidden: spec.MoE(num_experts=2, hidden=hidden, router=routing.SoftmaxTopK(top_k=1))
  model, _ = upcycled(build(small()), mixture, r'mlp$', jax.random.key(0))
  assert write.written(model).config['num_local_experts'] == 2
