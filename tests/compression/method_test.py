"""A method without anything of its own prepares nothing and asks for nothing; each of ours says what it needs."""
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_lm.compression.method import Method, RoundToNearest
from efficient_lm.formats import Int, MeanSquaredError
from efficient_lm.techniques import Awq, Gptq
from efficient_lm.weights import observed

OURS = [RoundToNearest(), RoundToNearest(range=MeanSquaredError()), Gptq(block=8), Awq()]


def test_the_defaults_leave_layer_and_statistics_and_need_no_data():
  layer, found = object(), {'up': {}}
  assert Method().prepare(layer, found, {}) == (layer, found)
  assert Method.needs == () and Method.range is None and Method.carries_quantized and not Method.true_sequential
  with pytest.raises(NotImplementedError): Method().encode(None, None, {})


@pytest.mark.parametrize('method', OURS, ids=lambda method: type(method).__name__)
def test_a_method_is_a_static_value_that_needs_statistics_that_there_are(method):
  """Static: equal ones have one compiled program."""
  assert isinstance(method, Method) and hash(method) == hash(method) and method == method
  assert all(observed.shape_of(name, 4) for name in method.needs)


@pytest.mark.parametrize('method', OURS, ids=lambda method: type(method).__name__)
def test_inputs_that_are_alike_leave_no_room_to_do_better_than_the_nearest_number(method):
  """With the identity as Gram matrix no column makes up for another; clipping chooses among ranges, absmax included."""
  w_OI, format = jnp.asarray(np.random.default_rng(0).normal(size=(6, 16)), jnp.float32), Int(bits=4)
  statistics = {'gram': jnp.eye(16), 'magnitude': jnp.ones(16), 'count': jnp.ones(1)}
  error = lambda encoded: float(jnp.sum(jnp.square(format.decode(encoded) - w_OI)))
  nearest = error(format.encode(w_OI, format.scales_for(w_OI, method.range)))
  got = error(method.encode(w_OI, format, {name: statistics[name] for name in (*method.needs, 'count')}))
  assert got < nearest if isinstance(method, Awq) else got == nearest
