"""A weight of any letters is a matrix, outputs by inputs; reductions over a cut matrix are those of the whole one."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from efficient_lm.errors import IncompatibleError
from efficient_lm.formats import MXFP4, NVFP4, Block, Group, Int, Percentile, Tensor, Ternary
from efficient_lm.weights.fake_quantized import FakeQuantized
from efficient_lm.weights.layout import Layout, matrix_shape, reduction
from efficient_lm.weights.quantizers import Rounding, quantize_tokens
from efficient_lm.weights.weight import Dense
from tests.formats.every import FORMATS
from tests.weights.every import SIZES, draw


@pytest.mark.parametrize('axes, inputs, order', [
  ('DNH', 'D', 'NHD'), ('NHD', 'NH', 'DNH'), ('DF', 'D', 'FD'), ('VD', 'D', 'VD'), ('EFD', 'F', 'EDF'), ('RNH', 'R', 'NHR')])
def test_a_weight_is_a_matrix_with_its_outputs_first(axes, inputs, order):
  array = jnp.stack([draw(axes), draw(axes, seed=1)])   # two layers
  layout = Layout.of(Dense(array, axes, inputs))
  matrix = layout.matrix(array)
  K = np.prod([SIZES[letter] for letter in inputs])
  np.testing.assert_array_equal(matrix, jnp.einsum(f'L{axes}->L{order}', array).reshape(*matrix.shape[:-1], K))
  np.testing.assert_array_equal(layout.array(matrix), array)


@pytest.mark.parametrize('format, refused', [(NVFP4(), True), (MXFP4(), False)], ids=lambda value: str(value))
def test_a_factor_that_devices_would_have_to_share_is_refused(mesh, format, refused):
  """Where `shard_map` cuts an expert, each would find a factor of its own, and train what is not stored."""
  local = lambda w_DF: FakeQuantized(Dense(w_DF, 'DF', 'D'), Rounding(format)).materialize()
  with mesh(1, 1, 4, 2):
    cut = PartitionSpec(None, 'tensor')
    mapped = jax.shard_map(local, in_specs=cut, out_specs=cut, check_vma=False)
    if refused:
      with pytest.raises(IncompatibleError, match=r"NVFP4 .*share an expert over \('tensor',\)"): mapped(draw('DF'))
    else: np.testing.assert_array_equal(mapped(draw('DF')), local(draw('DF')))


@pytest.mark.parametrize('axes, inputs', [('DF', 'D'), ('FD', 'F'), ('NHD', 'NH'), ('EDF', 'D')])
def test_shapes_are_known_without_the_array(axes, inputs):
  weight = Dense(jnp.stack([draw(axes)] * 3), axes, inputs)
  layout = Layout.of(jax.eval_shape(lambda: weight))
  matrix = layout.matrix(weight.materialize())
  assert layout == Layout.of(weight) and matrix_shape(weight) == matrix.shape[-2:]
  assert layout.array_shape(matrix.shape) == weight.shape


# ------------------------------------------------------------------ where `shard_map` has cut a matrix

CUT = {'DF': (None, 'tensor'), 'FD': ('tensor', None), 'NHD': ('tensor', None, None), 'DNH': (None, 'tensor', None)}


def over_devices(mesh, axes, function, result):
  """function(array) of the shards along 'tensor', with `result` as its PartitionSpec."""
  with mesh(1, 1, 4, 2):
    mapped = jax.shard_map(function, in_specs=PartitionSpec(*CUT[axes]), out_specs=PartitionSpec(*result), check_vma=False)
    return jax.jit(mapped)(draw(axes))


@pytest.mark.parametrize('axes', CUT)
@pytest.mark.parametrize('name', ['max', 'min', 'mean'])
def test_a_reduction_over_a_cut_dimension_is_that_of_one_device(mesh, axes, name):
  """As tiles (1, O, 1, I) of the whole matrix; and over dimensions that are not cut nothing is exchanged."""
  tiled = lambda array: array.reshape(1, -1, 1, array.shape[-1])
  of = lambda letters: lambda array: getattr(reduction(letters), name)(tiled(array))
  # A mean adds halves of the numbers first: 2048 float32 numbers of order one, in another order.
  close = functools.partial(np.testing.assert_allclose, rtol=0, atol=2. ** -22 if name == 'mean' else 0)
  close(over_devices(mesh, axes, of(axes), (None, None)), of(axes)(draw(axes)))
  own = over_devices(mesh, axes, of('D'), ('tensor', None))
  cut = axes.index('F' if 'F' in axes else 'N')
  close(own[:, 0], [of('D')(half)[0, 0] for half in jnp.split(draw(axes), 2, cut)])


def in_whole_groups(format):
  """The format with groups of which each lies on one device: 16 of the 32 inputs F that two of them share."""
  return dataclasses.replace(format, scales=Group(size=16)) if isinstance(format.scales, Group) else format


@pytest.mark.thinned
@pytest.mark.parametrize('axes, inputs', [('DF', 'D'), ('FD', 'F'), ('NHD', 'NH'), ('DNH', 'D')])
@pytest.mark.parametrize('format', [in_whole_groups(one) for one in FORMATS if not (
  one.joint or one.standard or isinstance(one.scales, Block))], ids=lambda one: one.name)
def test_a_matrix_that_is_cut_is_rounded_as_on_one_device(mesh, format, axes, inputs):
  """Scales that span the cut are found over all of it: what is trained is what is stored."""
  local = lambda array: FakeQuantized(Dense(array, axes, inputs), Rounding(format)).materialize()
  got, wanted = over_devices(mesh, axes, local, CUT[axes]), jax.jit(local)(draw(axes))
  # A scale that is a mean of 2048 or 4096 numbers depends on their order in its last bits.
  if isinstance(format, Ternary): np.testing.assert_allclose(got, wanted, rtol=2. ** -21)
  else: np.testing.assert_array_equal(got, wanted)


def test_tokens_whose_numbers_are_cut_are_rounded_as_on_one_device(mesh):
  """Products over hidden units, which 'tensor' has cut: the largest of a token may lie on another device."""
  weight = Dense(draw('FD'), 'FD', 'F')
  rounded = lambda x_BTF: quantize_tokens(Rounding(Int(bits=4)), x_BTF, 'BTF', weight.inputs)
  with mesh(1, 1, 4, 2):
    spec = PartitionSpec(None, None, 'tensor')
    got = jax.shard_map(rounded, in_specs=spec, out_specs=spec, check_vma=False)(draw('BTF'))
  np.testing.assert_array_equal(got, rounded(draw('BTF')))


def test_a_percentile_over_devices_is_refused(mesh):
  fitted = lambda w_DF: Int().scales_for(w_DF.T, Percentile(), Layout('DF', 'D').reduce(Int(scales=Tensor()))).scale
  with pytest.raises(IncompatibleError, match=r"percentile over devices \('tensor',\) is not defined: choose AbsMax"):
    over_devices(mesh, 'DF', fitted, (None, 'tensor'))
