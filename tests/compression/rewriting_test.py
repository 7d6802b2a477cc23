"""The first rule that matches decides, one that decides nothing is an error, the table shows what became of weights."""
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from efficient_lm.compression import rewriting
from efficient_lm.compression.rules import Rule
from efficient_lm.errors import IncompatibleError
from efficient_lm.formats import Group, Int, Ternary
from efficient_lm.models import spec
from efficient_lm.tree import num_bytes, select
from efficient_lm.weights.fake_quantized import FakeQuantized, Normalized
from efficient_lm.weights.low_precision import LowPrecision, low_precision
from efficient_lm.weights.masked import Masked
from efficient_lm.weights.observed import Observed
from efficient_lm.weights.quantized import Quantized, round_to_nearest
from efficient_lm.weights.quantizers import Rounding
from efficient_lm.weights.rotated import Rotated
from efficient_lm.weights.weight import Dense, Weight

D, F, V = 32, 64, 40


def model(mlp=None):
  attention = spec.GroupedQuery(num_heads=2, num_kv_heads=1, head_dim=16)
  stack = spec.Stack(num_layers=2, attention=attention, mlp=mlp or spec.SwiGLU(hidden=F))
  return spec.Transformer(vocab_size=V, dim=D, stacks=(stack,)).build(rngs=nnx.Rngs(0))


def stored(path, weight, rule): return round_to_nearest(weight, rule.weights)


def test_the_first_rule_that_matches_decides():
  decided = rewriting.assign(model(), (Rule(where='down$', weights=Int(bits=8)), Rule(weights=Int(bits=4)), Rule(where='')))
  assert decided['stacks/0/blocks/mlp/down'].weights.bits == 8
  assert decided['stacks/0/blocks/mlp/up'].weights.bits == 4
  assert decided['embed'].keeps


def test_routers_embedding_and_head_stay_float_unless_a_rule_names_them():
  mixture = model(spec.MoE(num_experts=2, hidden=16))
  layers = rewriting.apply(mixture, (Rule(weights=Int()),), stored)
  names = {path.split('/')[-1] for path, weight in select(layers, Weight) if not isinstance(weight, Quantized)}
  assert names == {'router', 'embed', 'own_head'}
  everything = rewriting.apply(mixture, (Rule(where='', weights=Int()),), stored)
  assert all(isinstance(weight, Quantized) for _, weight in select(everything, Weight))


def test_a_rule_that_matches_no_weight_is_an_error_that_names_what_there_is():
  with pytest.raises(ValueError, match=r"rules\[1\] with where='blcoks' .*: no weight matches; the paths are embed,"):
    rewriting.assign(model(), (Rule(weights=Int()), Rule(where='blcoks', weights=Int())))


def test_a_rule_that_others_stand_in_front_of_is_an_error():
  with pytest.raises(ValueError, match=r'rules\[1\] .* the rules before it decide all that it matches, such as stacks/0'):
    rewriting.assign(model(), (Rule(weights=Int()), Rule(where='up$', weights=Int(bits=4))))


def test_rules_that_keep_all_leave_the_model_itself():
  same = model()
  assert rewriting.apply(same, (Rule(), Rule(where='embed')), stored) is same


def test_the_table_shows_formats_products_and_bytes():
  changed = rewriting.apply(model(), (Rule(where='down$', weights=Int(bits=4, scales=Group(size=32))),), stored)
  lines = {line.path: line for line in rewriting.table(changed)}
  down, embed = lines['stacks/0/blocks/mlp/down'], lines['embed']
  assert (down.kind, down.product) == ('int4 per group of 32', 'float x int4')
  assert down.float_bytes == 2 * 4 * F * D and down.num_bytes == 2 * (F * D // 2 + 4 * D * F // 32)
  assert (embed.kind, embed.product, embed.num_bytes) == ('float32', 'float', 4 * V * D)
  others = num_bytes(changed) - sum(line.num_bytes for line in lines.values())
  assert others == 4 * D * 5, 'five norms are all that the table leaves out'
  shapes = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, changed))
  assert rewriting.table(shapes) == list(lines.values())


def test_large_weights_left_in_float_are_named():
  line = rewriting.describe(model(), (Rule(where='down$', weights=Int()),), 'Quantize')
  assert line.startswith('Quantize reaches ') and 'stacks/0/blocks/mlp/up' in line.split('left as they are: ')[1]


LOWER = dict(forward='int8', dgrad='int8', wgrad='int8')
AROUND = {
  'itself': lambda weight: weight, 'low precision': lambda weight: low_precision(weight, LOWER),
  'rotation': lambda weight: Rotated(weight, 2), 'observation': lambda weight: Observed(weight, ('count',)),
  'mask': lambda weight: Masked(weight, jnp.ones(weight.shape, bool)),
  'low precision of a mask': lambda weight: low_precision(Masked(weight, jnp.ones(weight.shape, bool)), LOWER),
}
QUANTIZED = {
  'QAT': lambda weight: FakeQuantized(weight, Rounding(Int(bits=4))),
  'QAT of activations': lambda weight: FakeQuantized(weight, None, Rounding(Int())),
  'BitNet': lambda weight: Normalized(FakeQuantized(weight, Rounding(Ternary()), Rounding(Int()))),
  'a norm': Normalized, 'stored': lambda weight: round_to_nearest(weight, Int(bits=4)),
}
LOST = 'is trained as float32.*: what it does to its input would be lost'
MESSAGES = {'stored': 'is stored as int4 per channel.* already', 'QAT of activations': LOST, 'a norm': LOST}


@pytest.mark.parametrize('around', AROUND)
@pytest.mark.parametrize('inside', QUANTIZED)
def test_what_is_quantized_is_found_under_anything(inside, around):
  """No rewriting takes it for a float weight; a stored one is not to be trained either."""
  weight = AROUND[around](QUANTIZED[inside](Dense(jnp.ones((8, 4)), 'FD', 'F')))
  assert not rewriting.is_float(weight)
  message = MESSAGES.get(inside, r'is trained as float32.*: the stage Convert\(\) stores it so')
  with pytest.raises(IncompatibleError, match=message): rewriting.require_float(weight)
  if inside != 'stored': rewriting.require_trainable(weight)
  else:
    with pytest.raises(IncompatibleError, match='training cannot change it'): rewriting.require_trainable(weight)


@pytest.mark.parametrize('around', AROUND)
def test_a_float_weight_is_one_under_anything(around):
  weight = AROUND[around](Dense(jnp.ones((8, 4)), 'FD', 'F'))
  assert rewriting.is_float(weight)
  rewriting.require_float(weight)
  rewriting.require_trainable(weight)
  bare = rewriting.without_low_precision({'w': weight})['w']
  assert not dict(select(bare, LowPrecision)) and bare.kind == weight.kind


def test_groups_that_do_not_divide_are_fitted_and_said():
  odd = (Rule(where='up$', weights=Int(scales=Group(size=12))), Rule(where='down$', weights=Int(scales=Group(size=16))))
  decided = rewriting.assign(model(), odd)
  assert decided['stacks/0/blocks/mlp/up'].weights == Int(scales=Group(size=8))
  assert decided['stacks/0/blocks/mlp/down'] is odd[1], 'what divides is left itself'
  line = rewriting.describe(model(), odd, 'Quantize')
  said = 'int8 per group of 8 in place of int8 per group of 12, which does not divide'
  assert line.endswith(f'; {said} stacks/0/blocks/mlp/up')
  pairs = [('a', Int(scales=Group(size=12)), Int(scales=Group(size=8))), ('b', Int(), Int()),
           ('c', Int(scales=Group(size=12)), Int(scales=Group(size=8)))]
  assert rewriting.replaced(pairs) == [f'{said} a and 1 more']


def test_what_a_change_refuses_is_refused_with_the_weight_s_path():
  def refuse(path, weight, rule): raise IncompatibleError('no')
  with pytest.raises(IncompatibleError, match=r'^stacks/0/blocks/mlp/up: no$'):
    rewriting.apply(model(), (Rule(where='up$', weights=Int()),), refuse)
