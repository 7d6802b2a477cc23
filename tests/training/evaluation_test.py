"""Bits per byte by hand, and the same whatever is read at once."""
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_lm.models import spec
from efficient_lm.models.decode import cached_sums
from efficient_lm.models.transformer import unrolled
from efficient_lm.parallel.sharding import single_device_mesh
from efficient_lm.training.evaluation import evaluate
from efficient_lm.training.losses import outputs_of

B, T, V = 8, 8, 32
MLPS = {'dense': spec.SwiGLU(hidden=16), 'experts': spec.MoE(num_experts=4, hidden=8)}


@functools.cache
def model_of(kind='dense'):
  """A model with numbers drawn by numpy."""
  stack = spec.Stack(num_layers=2, attention=spec.GroupedQuery(num_heads=2, num_kv_heads=1, head_dim=8), mlp=MLPS[kind])
  abstract = jax.eval_shape(lambda: spec.Transformer(vocab_size=V, dim=16, stacks=(stack,)).build(rngs=nnx.Rngs(0)))
  rng = np.random.default_rng(0)
  return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) * 0.5, leaf.dtype), abstract)


def batch_of(seed=0, rows=B):
  tokens, ones = np.random.default_rng(seed).integers(0, V, (rows, T + 1)).astype(np.int32), np.ones((rows, T), np.int32)
  return {'inputs_BT': tokens[:, :-1], 'targets_BT': tokens[:, 1:], 'weights_BT': ones.astype(np.float32),
          'bytes_BT': 2 * ones, 'segments_BT': ones, 'positions_BT': np.tile(np.arange(T, dtype=np.int32), (rows, 1))}


def padded_text(rows):
  """Fourteen rows, the last of them short, `rows` at a time; what does not fill a batch is padding."""
  text = batch_of(3, 14)
  for name in ('weights_BT', 'segments_BT', 'bytes_BT'): text[name][-1, 3:] = 0
  for begin in range(0, 14, rows):
    part = {name: x[begin:begin + rows] for name, x in text.items()}
    yield {name: np.pad(x, ((0, rows - len(x)), (0, 0))) for name, x in part.items()}


def test_bits_per_byte_by_hand():
  model, batches = model_of(), [batch_of(1), batch_of(2)]
  batches[1]['weights_BT'] = (np.arange(B * T).reshape(B, T) % 3 > 0).astype(np.float32)
  batches[1]['bytes_BT'] = np.random.default_rng(0).integers(0, 5, (B, T))
  found = evaluate(model, batches, single_device_mesh())
  nats, tokens = 0.0, 0
  for batch in batches:
    logits = np.asarray(jax.jit(lambda model, batch: outputs_of(model, batch).logits_BTV)(model, batch), np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    nats -= (np.take_along_axis(log_p, batch['targets_BT'][..., None], -1)[..., 0] * batch['weights_BT']).sum()
    tokens += batch['weights_BT'].sum()
  num_bytes = sum(batch['bytes_BT'].sum() for batch in batches)
  assert (found['tokens'], found['bytes']) == (tokens, num_bytes)
  assert found['bits_per_byte'] == pytest.approx(nats / math.log(2) / num_bytes, rel=1e-5)
  assert found['nats_per_token'] == pytest.approx(nats / tokens, rel=1e-5)
  assert found['perplexity'] == pytest.approx(math.exp(nats / tokens), rel=1e-4)


def test_a_model_that_knows_nothing_needs_the_logarithm_of_the_vocabulary():
  model = jax.tree.map(jnp.zeros_like, model_of())
  found = evaluate(model, [batch_of()], single_device_mesh())
  assert found['bits_per_byte'] * 2 == pytest.approx(math.log2(V), rel=1e-6)   # two bytes a token
  assert found['perplexity'] == pytest.approx(V, rel=1e-5)


@pytest.mark.parametrize('kind', MLPS)
def test_the_figure_does_not_depend_on_how_many_rows_are_read_at_once(kind):
  """Rows of padding count for nothing; a product of other rows may be summed in another order, to a few times 2**-24."""
  found = [evaluate(model_of(kind), padded_text(rows), single_device_mesh()) for rows in (3, 16)]
  for other in found[1:]:
    assert (other['tokens'], other['bytes']) == (found[0]['tokens'], found[0]['bytes']) == (13 * T + 3, 2 * (13 * T + 3))
    assert other['nats_per_token'] == pytest.approx(found[0]['nats_per_token'], rel=1e-6)


def test_batches_are_added_up_in_float64():
  """A thousand batches of little text after one of much: in float32 each of them would be lost."""
  sums = iter([(1e9, 1e9, 1e9), *[(1., 1., 1.)] * 1000])
  found = evaluate(None, [{}] * 1001, single_device_mesh(), lambda model, batch: next(sums))
  assert (found['tokens'], found['bytes']) == (10 ** 9 + 1000,) * 2 and found['nats_per_token'] == 1


@pytest.mark.parametrize('kind', MLPS)
def test_a_model_taken_apart_and_one_read_through_a_cache_are_as_good(kind):
  """A row is one text then: these have no padding."""
  batches, mesh = [batch_of(1)], single_device_mesh()
  stacked = evaluate(model_of(kind), batches, mesh)
  for other in (evaluate(unrolled(model_of(kind)), batches, mesh), evaluate(model_of(kind), batches, mesh, cached_sums)):
    assert other['nats_per_token'] == pytest.approx(stacked['nats_per_token'], rel=1e-5)
