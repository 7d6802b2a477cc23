"""Programs are made for any batch on any device, of every kind of model that can decode."""
import re

import jax
import jax.numpy as jnp
import pytest
from jax import export

from efficient_lm.errors import IncompatibleError
from efficient_lm.formats import Float8
from efficient_lm.interop.stablehlo import programs
from efficient_lm.models.spec import FloatCache, IntegerCache
from efficient_lm.tree import rewrite
from efficient_lm.weights.quantized import round_to_nearest
from efficient_lm.weights.quantizers import Rounding
from efficient_lm.weights.weight import Weight
from tests.interop.stablehlo.models import INT8, abstract

PLATFORMS = ('cpu', 'cuda', 'tpu')


def made(model, length=16, cache=FloatCache(), platforms=PLATFORMS):
  """Both programs, of shapes alone."""
  sizes = lambda batch: programs.Sizes(batch, length, 27, cache)
  batch, tokens = export.symbolic_shape('batch, tokens', constraints=[f'tokens <= {length}'])
  return (programs.prefill(model, sizes(batch), tokens).export(platforms),
          programs.decode_step(model, sizes(*export.symbolic_shape('batch'))).export(platforms))


def rounded(kind: str, format):
  """Shapes of a model whose products round their inputs as its weights are."""
  quantize = lambda _, weight: round_to_nearest(weight, format, Rounding(format=format))
  return jax.eval_shape(lambda model: rewrite(model, Weight, quantize), abstract(kind))


@pytest.mark.parametrize('name', ['capped', 'latent', 'float8', 'int8 experts'])
def test_any_batch_on_any_platform(name):
  others = {'float8': ('dense', Float8()), 'int8 experts': ('experts', INT8)}
  model = rounded(*others[name]) if name in others else abstract(name)
  for exported in made(model):
    assert exported.platforms == PLATFORMS
    assert str(exported.out_avals[0].shape) == '(batch, 27)' and exported.out_avals[0].dtype == jnp.float32


def test_arguments_are_weights_tokens_and_cache():
  sizes = programs.Sizes(2, 8, 27, IntegerCache(bits=4))
  one = programs.decode_step(abstract('dense'), sizes)
  assert one.weights[0][0] == 'embed/array/value' and one.weights[0][1].shape == (32, 16)
  assert [name for name, _ in one.arguments[:3]] == ['tokens', 'starts', 'cache/0/keys/x_BKSH']
  assert one.results[0] == 'logits' and list(one.results[1:]) == [name for name, _ in one.arguments[2:]]
  assert one.results == programs.prefill(abstract('dense'), sizes, 4).results
  exported = one.export(('cpu',))
  assert [(a.shape, a.dtype) for a in exported.in_avals] == [(a.shape, a.dtype) for _, a in one.weights + one.arguments]
  assert [(a.shape, a.dtype) for a in exported.out_avals[1:]] == [(a.shape, a.dtype) for _, a in one.arguments[2:]]


def test_programs_depend_neither_on_the_mesh_in_force_nor_on_the_folder(mesh):
  """For one device each, and without the places of the code that made them, the same text."""
  text = lambda exported: re.sub(r'^#loc.*\n| loc\(.*\)$', '', exported.mlir_module(), flags=re.M)
  alone = made(abstract('dense'), platforms=('cpu',))
  with mesh(2, 2, 1, 2): meshed = made(abstract('dense'), platforms=('cpu',))
  for one, other in zip(alone, meshed):
    assert text(one) == text(other)
    assert other.nr_devices == 1
    assert not re.findall(r'loc\("/', other.mlir_module())


def test_what_cannot_decode_is_refused():
  with pytest.raises(IncompatibleError, match='expert choice'): made(abstract('chosen'))
  with pytest.raises(IncompatibleError, match='16 positions'): made(abstract('positions'), length=17)
