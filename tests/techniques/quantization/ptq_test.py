"""The stage: what rules say is stored, by any method, on any model, and said truly beforehand."""
import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_lm import tree
from efficient_lm.compression.method import RoundToNearest
from efficient_lm.compression.rules import Rule
from efficient_lm.config import fields
from efficient_lm.errors import IncompatibleError
from efficient_lm.formats import MXFP4, Channel, Group, Int, MeanSquaredError
from efficient_lm.models import spec
from efficient_lm.ops import packing
from efficient_lm.parallel import sharding
from efficient_lm.techniques.quantization.awq import Awq
from efficient_lm.techniques.quantization.gptq import Gptq
from efficient_lm.techniques.quantization.ptq import Quantize
from efficient_lm.techniques.quantization.rotate import Rotate
from efficient_lm.techniques.quantization.smooth_quant import SmoothQuant
from efficient_lm.weights.quantized import Quantized, round_to_nearest
from efficient_lm.weights.rotated import Rotated, innermost
from efficient_lm.weights.weight import Weight
from tests.compressing import Context, abstractly, assert_structure, batch_of, logits_of, model_of

pytestmark = pytest.mark.usefixtures('quick_compilation')

FORMAT = Int(bits=3, scales=Group(size=8))
RULES = {'dense': (Rule(weights=FORMAT),), 'experts': (Rule(where='experts/', weights=FORMAT),)}
METHODS = {'nearest': RoundToNearest(), 'gptq': Gptq(block=16), 'in turn': Gptq(true_sequential=True, block=16),
           'awq': Awq(grid=5, clips=3)}


def stage(**changes):
  return Quantize(**dict(dict(rules=RULES['dense'], method=METHODS['gptq'], sequences=16, least_tokens=4), **changes))


@functools.cache
def after(method='gptq', mlp='dense'):
  return stage(method=METHODS[method], rules=RULES[mlp])(model_of(mlp=mlp), Context())


def error(model, mlp='dense'):
  """Of logits on tokens that were not calibrated on."""
  batch = batch_of(77)
  return float(jnp.mean(jnp.square(logits_of(model, batch) - logits_of(model_of(mlp=mlp), batch))))


@pytest.mark.thinned
@pytest.mark.parametrize('method, mlp', [
  ('nearest', 'dense'), ('gptq', 'dense'), ('in turn', 'dense'), ('awq', 'dense'), ('gptq', 'experts'), ('awq', 'experts')])
def test_all_that_rules_name_is_stored_in_their_format_and_shapes_are_known_beforehand(method, mlp):
  model, notes = after(method, mlp)
  for path, weight in tree.select(model, Weight):
    ruled = re.search(RULES[mlp][0].where, path) is not None
    assert isinstance(weight, Quantized) == ruled, path
    if ruled: assert weight.format == FORMAT
  assert_structure(abstractly(stage(method=METHODS[method], rules=RULES[mlp]), model_of(mlp=mlp)), model)
  assert notes[0].startswith('Quantize (') and 'left as they are: embed' in notes[0]
  assert (method == 'nearest') == (len(notes) == 1)
  if method != 'nearest': assert notes[1].startswith('calibrated on 256 tokens: output error 0.')


@pytest.mark.parametrize('method', ['gptq', 'awq'])
def test_the_divergence_from_the_float_model_is_noted(method):
  """Of the first calibration batch, by its equation over all logits."""
  model, notes = after(method)
  batch = next(iter(Context().batches(1)))
  exact, changed = (jax.nn.log_softmax(logits_of(one, batch)) for one in (model_of(), model))
  wanted = float(jnp.mean(jnp.sum(jnp.exp(exact) * (exact - changed), -1)))
  said = float(re.fullmatch(r'KL to the float model: ([0-9.]+) nats a token, of [0-9]+ calibration tokens', notes[-1])[1])
  assert wanted > 1e-3 and abs(said - wanted) < 1e-4, 'it is said with four digits'


def test_round_to_nearest_is_that():
  model, _ = after('nearest')
  plain = tree.rewrite(model_of(), Weight, lambda _, weight: round_to_nearest(weight, FORMAT), 'mlp/up$')
  a, b = (dict(tree.select(one, Weight))['stacks/0/blocks/mlp/up'].materialize() for one in (model, plain))
  np.testing.assert_allclose(a, b, rtol=1e-6)   # a scale that is compiled may differ in its last bit


def test_calibrated_methods_come_closer_to_the_float_model():
  errors = {method: error(after(method)[0]) for method in METHODS}
  assert errors['gptq'] < errors['nearest'] and errors['in turn'] < errors['nearest'] and errors['awq'] < errors['nearest']


def test_experts_too_come_closer():
  assert error(after('gptq', 'experts')[0], 'experts') < error(after('nearest', 'experts')[0], 'experts')


def test_an_expert_that_saw_too_few_tokens_is_quantized_by_round_to_nearest_and_named():
  few, notes = stage(least_tokens=10 ** 6, rules=RULES['experts'])(model_of(mlp='experts'), Context())
  plain, _ = after('nearest', 'experts')
  for a, b in zip(jax.tree.leaves(few), jax.tree.leaves(plain), strict=True): np.testing.assert_array_equal(a, b)
  line = next(note for note in notes if 'experts/gate' in note)
  assert re.search(r'saw \d+ to \d+ tokens; RTN, for want of 1000000, .* 0\.0, 0\.1, 0\.2, 0\.3, 1\.0', line)
  counts = next(note for note in after('gptq', 'experts')[1] if 'experts/gate' in note)
  low, high = map(int, re.search(r'saw (\d+) to (\d+) tokens', counts).groups())
  layers = re.findall(r'layer \d: ([\d ]+)', counts)
  assert [sum(map(int, layer.split())) for layer in layers] == [2 * 256] * 2 and len(layers[0].split()) == 4
  assert 0 < low <= 2 * 256 / 4 <= high, 'each of 256 tokens visits two of four experts'


def test_what_comes_before_quantization_is_done_before():
  model, notes = stage(before=(SmoothQuant(sequences=8), Rotate()))(model_of(), Context())
  assert [note.split()[0].rstrip(':') for note in notes[:3]] == ['SmoothQuant', 'Rotate', 'Quantize']
  down = dict(tree.select(model, Weight))['stacks/0/blocks/mlp/down']
  assert isinstance(down, Rotated) and isinstance(innermost(down), Quantized)
  assert_structure(abstractly(stage(before=(SmoothQuant(), Rotate())), model_of()), model)
  assert error(model) < error(after('nearest')[0])


def test_activations_are_quantized_where_a_rule_says_so_and_the_rest_too():
  rules = (Rule(where=r'(up|gate)$', weights=Int(), activations=Int()), Rule(where='own_head$', weights=Int()),
           Rule(where='key$'), Rule(where='down$', activations=Int()))
  model, _ = stage(rules=rules)(model_of(), Context())
  found = dict(tree.select(model, Weight))
  assert found['stacks/0/blocks/mlp/up'].product == 'int8 x int8' and isinstance(found['own_head'], Quantized)
  assert not isinstance(found['stacks/0/blocks/attention/key'], Quantized)
  assert found['stacks/0/blocks/mlp/down'].kind == 'float32'
  assert_structure(abstractly(stage(rules=rules), model_of()), model)


def test_eight_bits_are_nearly_the_float_model():
  model, _ = stage(rules=(Rule(where='(up|gate)$', weights=Int(scales=Channel())),))(model_of(), Context())
  assert error(model) < 1e-3 * float(jnp.var(logits_of(model_of())))


def test_a_format_that_does_not_fit_names_the_weight():
  with pytest.raises(IncompatibleError, match='stacks/0/blocks/mlp/down: groups of 32 do not divide 40 inputs'):
    stage(rules=(Rule(weights=MXFP4()),))(model_of(), Context())
  with pytest.raises(IncompatibleError, match='is stored as int3 per group of 8 already'): stage()(after()[0], Context())


def test_the_default_fits_its_groups_to_a_width_that_128_does_not_divide_and_says_so():
  """Of 576, as many small models have: groups of 96, the largest divisor below 128 that is a multiple of 8."""
  attention = spec.GroupedQuery(num_heads=9, num_kv_heads=3, head_dim=64)
  stack = spec.Stack(num_layers=1, attention=attention, mlp=spec.SwiGLU(hidden=256))
  described = spec.Transformer(vocab_size=16, dim=576, stacks=(stack,))
  model = jax.jit(lambda: described.build(rngs=nnx.Rngs(0)))()
  stored, (note,) = Quantize()(model, Context())
  groups = {path.split('/')[-1]: weight.format.scales.size for path, weight in tree.select(stored, Quantized)}
  assert groups == dict.fromkeys(('query', 'key', 'value', 'output', 'gate', 'up'), 96) | {'down': 128}
  assert re.search(r'int4 per group of 96 in place of int4 per group of 128, which does not divide stacks/\S+ and 5 m', note)
  assert_structure(abstractly(Quantize(), model), stored)
  # A tensor that is shorter than a group is one.
  short, (note,) = Quantize()(model_of(), Context())
  assert {weight.format.scales.size for _, weight in tree.select(short, Quantized)} == {32, 40}
  assert 'int4 per group of 32 in place of int4 per group of 128' in note


def test_no_data_is_one_clear_line():
  with pytest.raises(ValueError, match=r'^calibration has no data'): stage()(model_of(), Context(available=0))
  with pytest.raises(ValueError, match='asks for 100 sequences, but the data has 32'):
    stage(sequences=100)(model_of(), Context())


def test_qwix_reads_what_is_stored_and_multiplies_alike():
  """Another library (google/qwix) as oracle: its arrays made of our codes and scales."""
  qwix = pytest.importorskip('qwix', reason='qwix, the oracle, is not installed (extra `dev`)')
  model, _ = after('gptq')
  for path, weight in tree.select(model, Quantized, '(query|up|down)$'):
    layer = jax.tree.map(lambda leaf: leaf[1], weight)
    codes_OI, scale_QO = packing.unpack(layer.encoded.values, 3), layer.encoded.scales.scale
    array = qwix.QArray(codes_OI, scale_QO.T)
    np.testing.assert_array_equal(qwix.dequantize(array), layer.format.decode(layer.encoded), err_msg=path)
    x_MI = jnp.asarray(np.random.default_rng(0).normal(size=(5, codes_OI.shape[1])), jnp.float32)
    equations = {'query': 'BTD,DNH->BTNH', 'up': 'BTD,DF->BTF', 'down': 'BTF,FD->BTD'}
    y_MO = layer.contract(equations[path.split('/')[-1]], x_MI[None]).reshape(5, -1)
    # float32 sums of 40 products in another order.
    np.testing.assert_allclose(qwix.dot_general(x_MI, array, (((1,), (1,)), ((), ()))), y_MO, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('bits', [8, 4])
def test_round_to_nearest_of_qwix_is_no_better(bits):
  """It stretches grids half a step further, which costs the largest number and helps all others: errors are alike."""
  qwix = pytest.importorskip('qwix', reason='qwix, the oracle, is not installed (extra `dev`)')
  w_OI = jnp.asarray(np.random.default_rng(0).normal(size=(64, 64)), jnp.float32)
  format = Int(bits=bits, scales=Group(size=16))
  ours = format.decode(RoundToNearest().encode(w_OI, format, {}))
  theirs = qwix.dequantize(qwix.quantize(w_OI, f'int{bits}', channelwise_axes=(0,), tiled_axes={1: 16}))
  errors = [float(jnp.mean(jnp.square(one - w_OI))) for one in (ours, theirs)]
  assert 0.8 < errors[0] / errors[1] < 1.25


@pytest.mark.parametrize('method', [Gptq(range=MeanSquaredError()), Awq(), RoundToNearest()], ids=repr)
def test_a_config_can_hold_it(method):
  whole = Quantize(method=method, before=(SmoothQuant(where=r'norm$'), Rotate(hidden=64)))
  fields.check(whole)
  assert fields.from_json(json.loads(json.dumps(fields.to_json(whole)))) == whole


def test_a_wrong_field_is_named():
  wrong = Quantize(rules=(), sequences=0, least_tokens=-1)
  assert [name for name, _, _ in wrong.check()] == ['rules', 'sequences', 'least_tokens']


@pytest.mark.thinned
@pytest.mark.parametrize('mlp, method, format', [
  ('dense', METHODS['awq'], FORMAT), ('experts', METHODS['gptq'], FORMAT),   # 24 hidden units are 3 groups: not cut in two
  ('experts', METHODS['nearest'], Int(bits=4, scales=Group(size=4)))],
  ids=['dense', 'experts', 'experts that are cut'])
def test_over_eight_devices_it_calibrates_and_stores_as_on_one(mesh, mlp, method, format):
  """Fully sharded weights, experts and hidden units are cut in two; what comes out lies on the mesh. Sums in another order
  turn some roundings around, so models are compared by what they compute."""
  chosen = stage(method=method, rules=(Rule(weights=format),))
  alone, notes = chosen(model_of(mlp=mlp), Context())
  with mesh(1, 2, 2, 2):
    here = jax.sharding.get_mesh()
    spread = jax.device_put(model_of(mlp=mlp), sharding.shardings(model_of(mlp=mlp), here))
    model, notes_here = chosen(spread, Context(mesh=here))
    for leaf, wanted in zip(jax.tree.leaves(model), jax.tree.leaves(sharding.shardings(model, here)), strict=True):
      assert leaf.sharding.is_equivalent_to(wanted, leaf.ndim)
    logits = np.asarray(logits_of(model, sharding.place(batch_of(77), here)))
  assert notes_here[0] == notes[0] and len(notes_here) == len(notes)
  nats = [float(found[1]) for note in (*notes, *notes_here) if (found := re.match('KL to the float model: ([0-9.]+)', note))]
  assert len(nats) == (2 if method.needs else 0) and max(nats, default=1) < 1.1 * min(nats, default=1)
  change = jnp.mean(jnp.square(logits - logits_of(alone, batch_of(77))))
  assert change < 0.1 * error(alone, mlp)


def test_eight_bit_rules_reach_the_experts_in_the_compiled_model():
  """Of four experts of 32 x 24 no float copy is left in the whole model's program, and rows times them are integers."""
  rules = (Rule(weights=Int(), activations=Int()),)
  model, _ = stage(rules=rules, method=METHODS['nearest'])(model_of(mlp='experts'), Context())
  experts = dict(tree.select(model, Quantized, 'experts/'))
  assert len(experts) == 3 and {weight.product for weight in experts.values()} == {'int8 x int8'}
  text = logits_of.lower(model, batch_of()).compile().as_text()
  for shape in ('4,32,24', '4,24,32'):
    assert f's8[{shape}]' in text and not re.search(rf'f(32|16)\[(2,)?{shape}\]', text), shape
  assert re.search(r's32\[\d+,24\]\S* dot\(', text)
  floats = logits_of.lower(model_of(mlp='experts'), batch_of()).compile().as_text()
  assert re.search(r'f32\[(2,)?4,32,24\]', floats), 'the float model has what is looked for'
