"""GPTQ: round-to-nearest (RTN) where inputs are alike, and a smaller output error where they are not."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_lm import tree
from efficient_lm.compression import hessian
from efficient_lm.compression.solver import gptq
from efficient_lm.config import fields
from efficient_lm.errors import IncompatibleError
from efficient_lm.formats import MXFP4, NF4, NVFP4, Block, Float8, Group, Int, MidRise, Tensor
from efficient_lm.techniques import Gptq, NofM, PruneOnce, Quantize, Rule
from efficient_lm.weights.invariants import Pattern
from efficient_lm.weights.layout import Layout
from efficient_lm.weights.masked import Masked
from efficient_lm.weights.quantized import Quantized
from tests.compressing import Context, abstractly, assert_structure, model_of

pytestmark = pytest.mark.usefixtures('quick_compilation')

O, I = 24, 32
FORMATS = {
  'channel': Int(bits=4), 'group': Int(bits=3, scales=Group(size=8)), 'tensor': Int(bits=4, scales=Tensor()),
  'block': Int(bits=4, scales=Block(outputs=8, inputs=16)),
  'zero point': Int(bits=2, scales=Group(size=16), symmetric=False),
  'eight': Int(), 'mid-rise': MidRise(scales=Group(size=8)), 'NF4': NF4(scales=Group(size=16)), 'float8': Float8(),
  'MXFP4': MXFP4(), 'NVFP4': NVFP4(),
}
run = jax.jit(gptq, static_argnames=('format', 'act_order', 'block', 'damping'))


def weight(seed=0, lead=()):
  return jnp.asarray(np.random.default_rng(seed).normal(size=(*lead, O, I)), jnp.float32)


def gram(seed=0, M=256):
  """Of correlated inputs, some channels of which are large."""
  rng = np.random.default_rng(seed + 100)
  x_MI = rng.normal(size=(M, I // 4)) @ rng.normal(size=(I // 4, I)) + 0.3 * rng.normal(size=(M, I))
  x_MI *= np.exp(rng.normal(size=I))
  return jnp.asarray(x_MI.T @ x_MI, jnp.float32)


@functools.partial(jax.jit, static_argnames='format')
def nearest(w_OI, format):
  return format.encode(w_OI, format.scales_for(w_OI))


def error(format, encoded, seed, w_OI=None):
  return float(jnp.sum(hessian.output_error(format.decode(encoded) - (weight(seed) if w_OI is None else w_OI), gram(seed))))


def assert_equal(a, b):
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    assert x.dtype == y.dtype
    np.testing.assert_array_equal(np.asarray(x, np.float32), np.asarray(y, np.float32))


@pytest.mark.thinned
@pytest.mark.parametrize('name', FORMATS)
def test_with_the_identity_it_is_round_to_nearest(name):
  format = FORMATS[name]
  assert_equal(run(weight(), 7. * jnp.eye(I), format, block=8), nearest(weight(), format))


@pytest.mark.parametrize('name', FORMATS)
def test_it_stores_no_bit_more_and_errs_less(name):
  """In the mean over seeds; 8 bits and float8 leave hardly an error to begin with, and the same holds of them."""
  format, ratios = FORMATS[name], []
  for seed in range(4):
    found, plain = run(weight(seed), gram(seed), format, block=8), nearest(weight(seed), format)
    assert [(x.shape, x.dtype) for x in jax.tree.leaves(found)] == [(x.shape, x.dtype) for x in jax.tree.leaves(plain)]
    assert_equal(found.scales, plain.scales)
    ratios.append(error(format, found, seed) / error(format, plain, seed))
  assert np.mean(ratios) < 0.7 and max(ratios) < 1


def test_the_block_of_columns_changes_the_speed_only():
  """Sums of updates in another order: a code at the edge of two may fall to the other side, and few do."""
  format = FORMATS['group']
  whole = run(weight(), gram(), format, block=I)
  for block in (1, 5, 8):
    other = run(weight(), gram(), format, block=block)
    assert np.mean(np.asarray(format.decode(whole)) != np.asarray(format.decode(other))) < 0.02
    assert abs(error(format, other, 0) / error(format, whole, 0) - 1) < 0.05


def test_act_order_needs_no_permutation_to_be_stored_and_helps():
  format, gains = FORMATS['group'], []
  for seed in range(6):
    ordered, plain = (error(format, run(weight(seed), gram(seed), format, act_order=order), seed) for order in (True, False))
    gains.append(ordered / plain)
  assert np.mean(gains) < 1


def test_a_stack_is_its_matrices_one_by_one():
  w_LEOI, format = weight(lead=(2, 3)), FORMATS['zero point']
  grams = jnp.stack([jnp.stack([gram(3 * i + j) for j in range(3)]) for i in range(2)])
  together = run(w_LEOI, grams, format)
  for i in range(2):
    for j in range(3):
      one = run(w_LEOI[i, j], grams[i, j], format)
      # Batched factorisations add in another order.
      assert np.mean(np.asarray(format.decode(one)) != np.asarray(format.decode(together)[i, j])) < 0.02


def test_columns_of_dead_inputs_are_quantized_by_round_to_nearest():
  format, dead = Int(bits=4), jnp.arange(I) % 5 == 0
  alive = jnp.where(dead[:, None] | dead[None], 0, gram())
  found, plain = (np.asarray(format.decode(x)) for x in (run(weight(), alive, format), nearest(weight(), format)))
  np.testing.assert_array_equal(found[:, dead], plain[:, dead])
  assert np.any(found != plain)


def test_fewer_tokens_than_inputs_are_enough_to_run_on():
  format = FORMATS['group']
  assert np.all(np.isfinite(format.decode(run(weight(), gram(M=3), format))))


def test_a_wrong_field_is_named():
  assert [name for name, _, _ in Gptq(damping=-1., block=0).check()] == ['damping', 'block']
  assert not list(Gptq().check())


SPARSE = [Gptq(sparsity=0.5, block=8), Gptq(pattern=NofM(), block=8)]


def quantize(method, format=FORMATS['group'], **fields):
  return Quantize(rules=(Rule(weights=format), Rule(where='embed', weights=Int())), method=method, sequences=8, **fields)


@pytest.mark.thinned
@pytest.mark.parametrize('mlp', ['dense', 'experts'])
@pytest.mark.parametrize('method', SPARSE, ids=['half', '2:4'])
def test_with_a_sparsity_it_prunes_in_the_same_pass(mlp, method):
  """Every matrix of the layers, of each expert its own; what is in no layer stays whole. The zeros are promised."""
  model, stage = model_of(mlp=mlp), quantize(method, least_tokens=1)
  stored, notes = stage(model, Context())
  for path, weight in tree.select(stored, Quantized):
    matrix_OI = np.asarray(Layout.of(weight).matrix(weight.materialize()))
    share = np.mean(matrix_OI == 0, (-2, -1))
    if path == 'embed': assert np.all(share < 0.2)   # what rounds to 0
    else: assert np.all(share >= 0.5) and np.all(share < 0.75)
    if path == 'embed' or method.pattern is None: continue
    groups = matrix_OI.reshape(*matrix_OI.shape[:-1], -1, 4)
    assert np.all(np.count_nonzero(groups, axis=-1) <= 2) and weight.pattern == Pattern(2, 4)
  kinds = {one.kind for _, weight in tree.select(stored, Quantized, 'up$') for one in weight.invariants()}
  assert kinds >= {'bits', 'zeros'} | ({'pattern'} if method.pattern else set())
  assert any('of that of magnitude and RTN' in note for note in notes)
  assert_structure(abstractly(stage, model), stored)


def test_an_expert_that_saw_too_few_tokens_is_pruned_by_magnitude_and_rounded():
  stored, notes = quantize(SPARSE[0], least_tokens=10 ** 6)(model_of(mlp='experts'), Context())
  plain = {path: np.asarray(weight.materialize()) for path, weight in tree.select(
    PruneOnce(sparsity=0.5)(model_of(mlp='experts'), Context())[0], Masked)}
  for path, weight in tree.select(stored, Quantized, 'stacks'):
    assert not np.any(np.asarray(weight.materialize())[plain[path] == 0]), path
  assert any('; magnitude and RTN, for want of 1000000, of those of layer.expert 0.0' in note for note in notes)


def test_what_cannot_be_pruned_and_rounded_is_refused_in_a_line():
  none, no_zero = Rule(activations=Int()), Rule(weights=MidRise(scales=Group(size=8)))
  for stage, message in (
      (quantize(Gptq(pattern=NofM(m=64))), '2:64: 64 does not divide 32 inputs'),
      (Quantize(rules=(no_zero,), method=SPARSE[0]), 'has no zero, and what is pruned must be'),
      (Quantize(rules=(none,), method=SPARSE[0]), 'has no format for its weights to be pruned in')):
    with pytest.raises(IncompatibleError, match=message): stage(model_of(), Context())
  assert [name for name, _, _ in Gptq(sparsity=1.).check()] == ['sparsity']
  assert [name for name, _, _ in Gptq(sparsity=0.25, pattern=NofM()).check()] == ['sparsity']
  assert [name for name, _, _ in Gptq(pattern=Rule()).check()] == ['pattern'] and not list(Gptq(pattern=NofM()).check())
  assert 'sparsity' not in fields.to_json(Gptq()), 'so that no stage is made again for a new field'


def test_it_agrees_with_the_paper_s_code_column_by_column():
  """Algorithm 1 as written, in float64: explicit inverse, its Cholesky factor, no blocks, no order."""
  format, w_OI, damping = FORMATS['group'], np.array(weight(), np.float64), 0.01
  hessian_II = np.array(hessian.scaled(gram()), np.float64) + damping * np.eye(I)
  upper_II = np.linalg.cholesky(np.linalg.inv(hessian_II)).T
  step_OI = np.repeat(np.asarray(format.steps(format.scales_for(weight()))[0]), 8, 1)
  expected = np.empty_like(w_OI)
  for i in range(I):
    expected[:, i] = format.snap(w_OI[:, i], step_OI[:, i])
    error_O = (w_OI[:, i] - expected[:, i]) / upper_II[i, i]
    w_OI[:, i:] -= np.outer(error_O, upper_II[i, i:])
  found = np.asarray(format.decode(run(weight(), gram(), format, act_order=False)))
  assert np.mean(np.abs(found - expected) > step_OI / 2) < 0.01   # ties that float32 breaks otherwise
