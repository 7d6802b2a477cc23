"""What a weight promises holds of it, whatever is nested in what, and what is broken is seen."""
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_lm.formats import Int, MidRise
from efficient_lm.formats.granularity import tile
from efficient_lm.weights.fake_quantized import FakeQuantized, Normalized, fake_quantized
from efficient_lm.weights.invariants import Bits, Experts, Pattern, Zeros
from efficient_lm.weights.layout import Layout
from efficient_lm.weights.low_precision import low_precision
from efficient_lm.weights.masked import Masked
from efficient_lm.weights.observed import Observed
from efficient_lm.weights.quantized import round_to_nearest
from efficient_lm.weights.quantizers import Rounding
from efficient_lm.weights.rotated import Rotated
from efficient_lm.weights.weight import Dense
from tests.formats.every import FORMATS, NAMES
from tests.weights.every import draw

LETTERS = [('DF', 'D'), ('EFD', 'F'), ('NHD', 'NH')]
INT8 = dict.fromkeys(('forward', 'dgrad', 'wgrad'), 'int8')


def two_of_four(axes, inputs) -> Masked:
  """The first two of every four inputs."""
  dense = Dense(draw(axes), axes, inputs)
  layout = Layout.of(dense)
  matrix_OI = layout.matrix(dense.materialize())
  keep_OI = jnp.broadcast_to(jnp.arange(matrix_OI.shape[-1]) % 4 < 2, matrix_OI.shape)
  return Masked(dense, layout.array(keep_OI), Pattern(2, 4))


NESTED = {
  'masked': lambda masked: masked,
  'QAT': lambda masked: fake_quantized(masked, Rounding(Int(bits=4))),
  'QAT without a zero': lambda masked: fake_quantized(masked, Rounding(MidRise())),
  'QAT, stored': lambda masked: fake_quantized(masked, Rounding(Int(bits=4))).converted(),
  'QAT, after a norm': lambda masked: Normalized(fake_quantized(masked, Rounding(Int(bits=2)), Rounding(Int()))),
  'low precision': lambda masked: low_precision(masked, INT8),
  'QAT in low precision': lambda masked: low_precision(fake_quantized(masked, Rounding(Int(bits=4))), INT8),
  'observed': lambda masked: Observed(masked, ('count',)),
}
KINDS = {
  'masked': {'zeros', 'pattern'}, 'QAT': {'zeros', 'pattern', 'bits'}, 'QAT without a zero': {'zeros', 'pattern', 'bits'},
  'QAT, stored': {'zeros', 'bits'}, 'QAT, after a norm': {'zeros', 'pattern', 'bits'}, 'low precision': {'zeros', 'pattern'},
  'QAT in low precision': {'zeros', 'pattern', 'bits'}, 'observed': {'zeros', 'pattern'},
}


@pytest.mark.parametrize('axes, inputs', LETTERS)
@pytest.mark.parametrize('name', NESTED)
def test_a_weight_keeps_what_it_promises_and_what_its_mask_promised(name, axes, inputs):
  masked = two_of_four(axes, inputs)
  weight = NESTED[name](masked)
  assert {one.kind for one in weight.invariants()} == KINDS[name] | ({'experts'} if axes.startswith('E') else set())
  for one in (*weight.invariants(), *masked.invariants()): assert one.held_by(weight), str(one)
  assert np.mean(np.asarray(weight.materialize()) == 0) >= 0.5


def test_a_rotated_matrix_has_zeros_of_its_own_which_are_none_of_the_weight():
  rotated = Rotated(two_of_four('FD', 'F'), 8)
  assert rotated.invariants() == () and not rotated.inner.invariants()[0].held_by(rotated)


@pytest.mark.parametrize('axes, inputs', LETTERS)
def test_what_is_broken_is_seen(axes, inputs):
  masked = two_of_four(axes, inputs)
  zeros, pattern = (next(one for one in masked.invariants() if one.kind == kind) for kind in ('zeros', 'pattern'))
  other = Dense(masked.materialize().reshape(-1).at[-1].set(1e-30).reshape(masked.shape),
                axes, inputs)
  assert not zeros.held_by(other) and not pattern.held_by(other), 'a single entry that is not zero'
  assert not zeros.held_by(Dense(masked.materialize()[..., :1], axes, inputs)), 'another shape'
  assert not Bits(4, 'int4').held_by(masked) and not Bits(3, 'int3').held_by(round_to_nearest(masked, Int(bits=4)))
  assert Bits(4, 'int4').held_by(round_to_nearest(masked, Int(bits=2))), 'fewer are fine'
  assert Experts(4).held_by(masked) == axes.startswith('E') and not Experts(3).held_by(masked)


@pytest.mark.parametrize('format', FORMATS, ids=NAMES)
def test_a_tile_has_no_more_levels_than_its_bits_say(format):
  weight = round_to_nearest(Dense(draw('FD'), 'FD', 'D'), format)
  bits, = (one for one in weight.invariants() if one.kind == 'bits')
  assert bits == Bits(format.bits, format.name) and str(bits) == format.name
  tiles = np.asarray(tile(weight.materialize(), format.scales.counts(*weight.shape)))
  for i, j in np.ndindex(tiles.shape[0], tiles.shape[2]): assert len(np.unique(tiles[i, :, j])) <= 2 ** bits.bits


def test_zeros_are_those_of_each_layer_and_of_each_copy():
  keep = np.random.default_rng(0).random((2, 6, 5)) < 0.5
  array = jnp.asarray(np.where(keep, 1., 0.), jnp.float32)
  zeros = Zeros(jnp.asarray(keep))
  for i in range(2): assert zeros.layer(i).held_by(Dense(array[i], 'DF', 'D'))
  assert zeros.copied(3, 1).held_by(Dense(jnp.stack([array] * 3, 1), 'EDF', 'D'))
  assert str(zeros) == f'{1 - keep.mean():.1%} zeros' and str(Experts(3)) == '3 experts' and str(Pattern(2, 4)) == '2:4'


def test_a_pattern_runs_along_the_inputs_wherever_they_stand():
  """The same array, 2 of 4 along its first dimension."""
  array = jnp.where((jnp.arange(64) % 4 < 2)[:, None], draw('DF'), 0)
  assert Pattern(2, 4).held_by(Dense(array, 'DF', 'D')) and not Pattern(2, 4).held_by(Dense(array, 'FD', 'D'))
  assert Pattern(2, 4).held_by(Dense(array.T, 'FD', 'D'))
  assert Pattern(2, 4).held_by(Dense(array.reshape(2, 32, 32), 'NHD', 'NH')), 'inputs are merged'
  assert not Pattern(2, 3).held_by(Dense(array, 'DF', 'D')), '3 does not divide 64'


def test_activations_alone_leave_the_promises_of_the_weight():
  masked = two_of_four('DF', 'D')
  weight = FakeQuantized(masked, None, Rounding(Int()))
  assert [str(one) for one in weight.invariants()] == [str(one) for one in masked.invariants()] == ['50.0% zeros', '2:4']
