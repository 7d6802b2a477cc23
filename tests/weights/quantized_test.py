"""Stored weights: frozen, as small as their codes, read by rows, cut over devices; integers are multiplied."""
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_lm.formats import Float8, Group, Int, MidRise, Tensor, Ternary
from efficient_lm.parallel.sharding import shardings
from efficient_lm.tree import num_bytes
from efficient_lm.weights.quantized import round_to_nearest
from efficient_lm.weights.quantizers import Rounding
from efficient_lm.weights.weight import Dense, Transposed
from tests.formats.every import FORMATS, NAMES
from tests.weights.every import EQUATIONS, draw, pair

every = pytest.mark.parametrize('format', FORMATS, ids=NAMES)


@pytest.mark.parametrize('format, activations, product', [
  (Int(), Int(), 'int8 x int8'), (Int(), None, 'float x int8'), (Int(bits=4, scales=Group(size=32)), None, 'float x int4'),
  (Ternary(), Int(), 'int8 x ternary'), (Int(bits=3), None, 'float, dequantized first'),
  (Float8(), Float8(), 'float8_e4m3fn x float8 e4m3')], ids=lambda x: x if isinstance(x, str) else '')
def test_the_table_says_what_is_multiplied(format, activations, product):
  trained, stored, x = pair(*EQUATIONS[2], format, activations)
  assert stored.product == product and stored.kind == format.name
  assert trained.kind == f'float32, fake-quantized to {format.name}'
  text = jax.jit(functools.partial(stored.contract, EQUATIONS[2][0])).lower(x).as_text()
  integers = 'i8>, tensor' in text.replace('xi8>', 'i8>') and 'dot_general' in text and 'xi32>' in text
  assert integers == (product in ('int8 x int8', 'int8 x ternary'))


@pytest.mark.thinned
@every
def test_experts_multiply_their_own_rows(format):
  array, sizes, x = draw('EDF'), jnp.array([2, 0, 3, 1]), draw('BTD', seed=1).reshape(6, 64)
  x = jnp.concatenate([x, jnp.full((1, 64), 1e3)])   # past the last group
  stored = round_to_nearest(Dense(array, 'EDF', 'D'), format)
  each = [np.asarray(x[i]) @ np.asarray(stored.materialize())[e] for i, e in enumerate([0, 0, 2, 2, 2, 3])]
  # Sums of 64 products of order one, in another order.
  np.testing.assert_allclose(stored.contract_grouped(x, sizes), np.stack([*each, np.zeros(32)]), rtol=1e-4, atol=1e-4)


@pytest.mark.thinned
@every
def test_an_embedding_is_read_by_rows_and_as_a_head(format):
  table = round_to_nearest(Dense(draw('VD'), 'VD', 'D'), format)
  ids = jnp.array([[3, 0, 39], [9, 3, 1]])
  np.testing.assert_array_equal(table.take(ids), table.materialize()[ids])
  head, x = Transposed(table), draw('BTD', seed=2)
  wanted = jnp.einsum('BTD,VD->BTV', x, table.materialize())
  np.testing.assert_allclose(head.contract('BTD,DV->BTV', x, jnp.float32), wanted, rtol=1e-4, atol=1e-4)
  assert head.kind == format.name


def test_a_stored_weight_is_frozen_and_as_small_as_its_codes():
  stored = round_to_nearest(Dense(draw('DF'), 'DF', 'D'), Int(bits=4, scales=Group(size=64)))
  assert num_bytes(stored) == 64 * 32 // 2 + 4 * 32
  assert not jax.tree.leaves(nnx.state(stored, nnx.Param))


@pytest.mark.parametrize('sizes', [(1, 2, 1, 4), (2, 1, 2, 2)])
@pytest.mark.parametrize('format', [Int(), Int(bits=4, scales=Group(size=16)), Int(scales=Tensor()), MidRise(), Float8()],
                         ids=lambda format: format.name)
def test_over_devices_a_stored_weight_is_cut_and_multiplies_as_on_one(mesh, sizes, format):
  stored, x = round_to_nearest(Dense(draw('DF'), 'DF', 'D'), format, Rounding(Int())), draw('BTD', seed=1)
  run = jax.jit(lambda weight, x: weight.contract('BTD,DF->BTF', x))
  wanted = run(stored, x)
  with mesh(*sizes):
    placed = jax.device_put(stored, shardings(stored, jax.sharding.get_mesh()))
    shard = placed.values.get_value().addressable_shards[0].data
    assert shard.size * sizes[1] * sizes[3] == stored.values.get_value().size
    # Integers sum exactly; floats in another order.
    np.testing.assert_allclose(run(placed, x), wanted, rtol=1e-4, atol=1e-4)


def test_eight_bit_rules_put_products_of_integers_for_experts_into_the_compiled_program():
  """What other stacks leave out in silence. Read off the program that XLA has compiled."""
  rounding, sizes = Rounding(Int()), jnp.array([2, 0, 3, 1])
  expert = round_to_nearest(Dense(draw('EDF'), 'EDF', 'D'), Int(), rounding)
  assert expert.product == 'int8 x int8'
  compiled = jax.jit(lambda weight, x: weight.contract_grouped(x, sizes)).lower(expert, draw('BTD').reshape(6, 64)).compile()
  text = compiled.as_text()
  assert 's32[' in text and 's8[4,64,32]' in text, 'the matrices enter as they are stored, and integers come out'
  assert re.search(r's32\[\d+,32\]\S* (dot|custom-call|fusion|call)\(', text)
