"""Parameters and FLOPs agree with counts by hand and with XLA; meters say where their figures come from."""
import dataclasses
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_lm.formats import Group, Int
from efficient_lm.models import spec
from efficient_lm.models.moe import routing
from efficient_lm.runs import measure
from efficient_lm.techniques import PruneOnce, Quantize, Rule
from efficient_lm.tree import rewrite, select, size
from efficient_lm.weights.fake_quantized import FakeQuantized
from efficient_lm.weights.quantized import Quantized
from efficient_lm.weights.quantizers import Rounding
from efficient_lm.weights.weight import Weight
from tests.compressing import Context, model_of

D, F, V, L, N, H = 64, 128, 256, 2, 4, 16


def abstract(mlp=None, attention=None, **changes):
  stack = spec.Stack(num_layers=L, mlp=mlp or spec.SwiGLU(hidden=F), attention=attention or spec.GroupedQuery(
    num_heads=N, num_kv_heads=2, head_dim=H))
  model = spec.Transformer(vocab_size=V, dim=D, stacks=(stack,), **changes)
  return jax.eval_shape(lambda: model.build(rngs=nnx.Rngs(0)))


def moe(**changes):
  return spec.MoE(num_experts=8, hidden=32, router=routing.SoftmaxTopK(top_k=2), **changes)


def test_dense_parameters_by_hand():
  attention, mlp, norms = 2 * D * N * H + 2 * D * 2 * H, 3 * D * F, 2 * D
  counted = measure.parameters(abstract())
  assert counted.total == counted.active == 2 * V * D + D + L * (attention + mlp + norms)
  assert counted.embedding == V * D


def test_total_is_the_number_of_stored_numbers_of_a_plain_model():
  for model in (abstract(), abstract(moe(num_shared=1)), abstract(tied=True)):
    assert measure.parameters(model).total == size(model)


def other():
  """With biases, a table of positions, norms that shift and a gate of a shared layer; two kinds of layers, twice each."""
  attention = spec.GroupedQuery(num_heads=N, num_kv_heads=2, head_dim=H, window=4, biases=('query', 'output'))
  shared = spec.SigmoidGated(inner=spec.SwiGLU(hidden=F))
  layers = (spec.Layer(attention=attention, mlp=spec.Plain(hidden=F, activation='relu')),
            spec.Layer(attention=dataclasses.replace(attention, window=None), mlp=moe(shared=shared)))
  return spec.Transformer(vocab_size=V, dim=D, stacks=(spec.Repeated(num_repeats=2, layers=layers),), norm=spec.LayerNorm(),
                          ends=spec.Ends(positions=spec.Learned(length=50)))


def test_parts_of_other_families_are_counted():
  """Of two repeats: each matrix once a token; biases and norms are parameters and no FLOPs, positions are looked up."""
  model, T = jax.eval_shape(lambda: other().build(rngs=nnx.Rngs(0))), 8
  counted = measure.parameters(model)
  assert counted.total == size(model) and counted.embedding == (V + 50) * D
  assert counted.total - counted.active == 2 * (8 - 2) * 3 * D * 32
  attention, plain, mixture = 2 * D * N * H + 2 * D * 2 * H, 2 * D * F, D * 8 + 2 * 3 * D * 32 + D + 3 * D * F
  pairs = measure.mean_keys(T, 4) + measure.mean_keys(T)
  assert measure.flops_per_token(model, T).forward == 2 * (
    2 * (2 * attention + plain + mixture) + V * D + 2 * 2 * N * H * pairs)


def test_of_eight_experts_two_are_active():
  counted = measure.parameters(abstract(moe()))
  assert counted.total - counted.active == L * (8 - 2) * 3 * D * 32


def test_one_expert_costs_what_a_dense_layer_costs_plus_its_router():
  one = spec.MoE(num_experts=1, hidden=F, router=routing.SoftmaxTopK(top_k=1))
  dense, sparse = (measure.flops_per_token(abstract(mlp), 8).forward for mlp in (None, one))
  assert sparse - dense == 2 * L * D * 1


def test_counting_does_not_depend_on_the_kind_of_weight():
  model = abstract()
  rounded = lambda weight: FakeQuantized(weight, Rounding(Int(bits=4)))
  for change in (rounded, lambda weight: rounded(weight).converted()):
    changed = jax.eval_shape(lambda model, change=change: rewrite(model, Weight, lambda _, weight: change(weight)), model)
    assert measure.parameters(changed) == measure.parameters(model)
    assert measure.flops_per_token(changed, 8) == measure.flops_per_token(model, 8)


def test_training_costs_6_n_and_attention():
  """6 N D of Kaplan et al. 2020 with N the matrices that multiply: the head does, the embedding table does not."""
  model, T = abstract(), 32
  counted = measure.parameters(model)
  norms = (2 * L + 1) * D
  attention = 6 * 2 * L * N * H * (T + 1) / 2
  assert measure.flops_per_token(model, T).training == 6 * (counted.total - counted.embedding - norms) + attention


def test_a_tied_head_still_costs_its_product():
  assert measure.flops_per_token(abstract(tied=True), 8) == measure.flops_per_token(abstract(), 8)


@pytest.mark.parametrize('T, window', [(1, None), (7, None), (7, 3), (7, 1), (4, 9)])
def test_mean_keys_is_the_mean_of_what_each_query_sees(T, window):
  assert measure.mean_keys(T, window) == pytest.approx(sum(min(i, window or T) for i in range(1, T + 1)) / T)


def test_latent_attention_by_hand():
  latent = spec.Latent(num_heads=N, query_rank=None, kv_rank=8, nope_dim=16, rope_dim=4, value_dim=12)
  short, long = (measure.flops_per_token(abstract(attention=latent), T).forward for T in (1, 3))
  assert long - short == 2 * L * N * (16 + 4 + 12)   # one more key on average


def test_xla_counts_the_same_up_to_what_the_convention_leaves_out():
  """XLA counts the whole attention square, and some ten operations an activation (norms, softmax, gates, rotation)."""
  big = spec.Transformer(vocab_size=1024, dim=256, stacks=(spec.Stack(
    num_layers=1, attention=spec.GroupedQuery(num_heads=4, num_kv_heads=4, head_dim=64), mlp=spec.SwiGLU(hidden=1024)),))
  model, T = jax.eval_shape(lambda: big.build(rngs=nnx.Rngs(0))), 64
  tokens = jax.ShapeDtypeStruct((2, T), jnp.int32)
  compiled = jax.jit(lambda model, tokens: model(tokens).logits_BTV).lower(model, tokens).compile()
  ratio = compiled.cost_analysis()['flops'] / (2 * T) / measure.flops_per_token(model, T).forward
  assert 1 <= ratio < 1.05


def test_an_attention_layer_without_a_count_is_an_error_not_a_zero():
  with pytest.raises(TypeError, match='no FLOP count'): measure.attention_flops(object(), 8)


def test_state_bytes():
  model = abstract()
  moments = jax.eval_shape(lambda model: (model, model), nnx.state(model, nnx.Param))
  held = measure.state_bytes(model, moments)
  assert held == measure.StateBytes(4 * size(model), 4 * size(model), 8 * size(model))
  assert held.total == 16 * size(model)


@pytest.mark.parametrize('kind, peak', [
  ('NVIDIA H100 80GB HBM3', 989e12), ('NVIDIA H100 PCIe', 756e12), ('NVIDIA H200', 989e12),
  ('NVIDIA A100-SXM4-80GB', 312e12),
  ('NVIDIA L40S', 362e12), ('NVIDIA L4', 121e12), ('TPU v4', 275e12),
  ('TPU v5', 459e12), ('TPU v5p', 459e12), ('TPU v5e', 197e12), ('TPU v5 lite', 197e12), ('TPU v6 lite', 918e12),
  ('TPU7x', 1153e12),
  ('cpu', None)])
def test_peak_flops(kind, peak):
  assert measure.peak_flops(types.SimpleNamespace(device_kind=kind)) == peak


def test_peak_memory_is_that_since_it_was_asked_for():
  """As far as the system tells: of a stage, not of all that the process did before."""
  large = np.ones(300 * 2 ** 20, np.uint8)
  first, source = measure.PeakMemory().read()
  assert first > large.nbytes and source
  del large
  memory = measure.PeakMemory()
  before, _ = memory.read()
  if source.startswith('resident'): assert before < first - 200 * 2 ** 20
  held = np.ones(100 * 2 ** 20, np.uint8)
  assert memory.read()[0] >= before + held.nbytes // 2


def test_free_memory_is_some_bytes_or_unknown():
  free = measure.free_memory()
  assert free is None or free > 2 ** 20


@pytest.mark.parametrize('mlp', ['dense', 'experts'])
def test_zeros_are_counted_in_the_matrices_that_weights_stand_for(mlp):
  """Whatever their form: dense, masked, quantized."""
  model = model_of(mlp=mlp)
  assert measure.nonzero_parameters(model) == measure.parameters(model).total
  pruned, _ = PruneOnce(sparsity=0.5)(model, Context())
  zeros = sum(int((np.asarray(weight.materialize()) == 0).sum()) for _, weight in select(pruned, Weight))
  assert measure.parameters(pruned).total - measure.nonzero_parameters(pruned) == zeros > 0
  few, _ = Quantize(rules=(Rule(weights=Int(bits=8)),))(pruned, Context())
  assert measure.nonzero_parameters(few) <= measure.nonzero_parameters(pruned)


def test_bits_per_parameter_count_scales_and_masks():
  model = model_of()
  assert measure.bits_per_parameter(model) == 32
  few, _ = Quantize(rules=(Rule(weights=Int(bits=4, scales=Group(size=8))),))(model, Context())
  weights = [weight for _, weight in select(few, Quantized)]
  stored = sum(leaf.nbytes for weight in weights for leaf in jax.tree.leaves(weight))
  plain = 4 * (measure.parameters(few).total - sum(math.prod(weight.shape) for weight in weights))
  assert measure.bits_per_parameter(few) == 8 * (stored + plain) / measure.parameters(few).total < 16


def test_candidates_are_timed_in_turns():
  order = []
  seconds = measure.interleaved({name: lambda name=name: order.append(name) for name in 'ab'}, repeats=2)
  assert order == ['a', 'b'] * 3 and {name: len(times) for name, times in seconds.items()} == {'a': 2, 'b': 2}
  assert measure.time_call(lambda: jnp.ones(3)) >= 0


def test_histograms_are_thinned():
  model = {'a': jnp.arange(10.0), 'b': jnp.arange(3), 'c': jnp.zeros(0)}
  assert [(name, list(values)) for name, values in measure.histogram_arrays(model, 5)] == [('a', [0, 2, 4, 6, 8])]
