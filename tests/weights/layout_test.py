"""A weight of any letters is a matrix, outputs by inputs; reductions over a cut matrix are those of the whole one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from efficient_lm.errors import IncompatibleError
from efficient_lm.formats import MXFP4, NVFP4
from efficient_lm.weights.fake_quantized import FakeQuantized
from efficient_lm.weights.layout import Layout
from efficient_lm.weights.quantizers import Rounding
from efficient_lm.weights.weight import Dense
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
