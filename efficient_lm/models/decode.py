"""Text from a model: the prompt is read once into a KV cache, then tokens are drawn in jitted bursts."""
import dataclasses
import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from efficient_lm.axes import settle
from efficient_lm.models import spec as specs
from efficient_lm.models.transformer import Stack, outputs_first, unrolled


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Sampling:
  """How a token is drawn. temperature 0 takes the most likely one; `top_k` keeps the k most likely; `top_p` keeps the
  smallest set of most likely tokens whose probability reaches p (Holtzman et al. 2020)."""
  temperature: float = 1.0
  top_k: int | None = None
  top_p: float | None = None

  def __post_init__(self):
    if self.temperature < 0: raise ValueError(f'temperature = {self.temperature}: must be 0 (greedy) or positive')
    if self.top_k is not None and self.top_k < 1: raise ValueError(f'top_k = {self.top_k}: must be at least 1')
    if self.top_p is not None and not 0 < self.top_p <= 1: raise ValueError(f'top_p = {self.top_p}: must be in (0, 1]')

  def __call__(self, logits_BV, key):
    """ids_B drawn from the kept tokens."""
    if self.temperature == 0: return jnp.argmax(logits_BV, -1)
    return jax.random.categorical(key, self.keep(logits_BV / self.temperature))

  def keep(self, logits_BV):
    """The logits, -inf where a token may not be drawn."""
    if self.top_k is not None:
      least_B1 = lax.top_k(logits_BV, min(self.top_k, logits_BV.shape[-1]))[0][:, -1:]
      logits_BV = jnp.where(logits_BV >= least_B1, logits_BV, -jnp.inf)
    if self.top_p is not None:
      sorted_BV = jnp.sort(logits_BV, descending=True)
      before_BV = jnp.cumsum(jax.nn.softmax(sorted_BV), -1) - jax.nn.softmax(sorted_BV)
      least_B1 = jnp.min(jnp.where(before_BV < self.top_p, sorted_BV, jnp.inf), -1, keepdims=True)
      logits_BV = jnp.where(logits_BV >= least_B1, logits_BV, -jnp.inf)
    return logits_BV


def ready(model):
  """The model as decoding reads it, its layers copied apart and on a CPU its matrices turned; itself if it is that."""
  if not any(isinstance(stack, Stack) for stack in model.stacks): return model
  arrange = (lambda model: outputs_first(unrolled(model))) if jax.default_backend() == 'cpu' else unrolled
  return settle(jax.jit(arrange)(model))


@functools.partial(jax.jit, static_argnames=('length', 'vocab_size', 'cache'))
def prefill(model, prompt_BT, *, length: int, vocab_size: int, cache=specs.FloatCache()):
  """Reads the prompt into a cache of `length` slots: the logits after its last token, (B, vocab_size), and the cache."""
  outputs = model(prompt_BT, cache=model.init_cache(prompt_BT.shape[0], length, cache))
  last = dataclasses.replace(outputs, hidden_BTD=outputs.hidden_BTD[:, -1:])
  return last.logits_BTV[:, 0, :vocab_size], outputs.cache


@functools.partial(jax.jit, static_argnames=('count', 'vocab_size'), donate_argnames='cache')
def burst(model, logits_BV, cache, start, key, sampling, *, count: int, vocab_size: int):
  """Draws `count` tokens: ids (B, count), and the logits and cache after the last of them.

  Token i of the text uses the key folded with i, so that a text does not depend on how it was cut into bursts.
  """
  def one(carry, index):
    logits_BV, cache = carry
    ids_B = sampling(logits_BV, jax.random.fold_in(key, index))
    outputs = model(ids_B[:, None], cache=cache, start=index)
    return (outputs.logits_BTV[:, 0, :vocab_size], outputs.cache), ids_B
  (logits_BV, cache), ids = lax.scan(one, (logits_BV, cache), start + jnp.arange(count))
  return ids.T, logits_BV, cache


@functools.partial(jax.jit, static_argnames=('cache',))
def cached_sums(model, batch, cache=specs.FloatCache()):
  """Nats, counted targets and bytes of text of one batch, as `train.evaluation_sums`, but decoded: each row token by token
  through a cache of this format, the next token being that of the text. A row is one text, whatever documents it holds."""
  def one(slots, token):
    index, inputs_B, targets_B = token
    outputs = model(inputs_B[:, None], cache=slots, start=index)
    nll_BT, _ = outputs.head.nll(outputs.hidden_BTD, targets_B[:, None])
    return outputs.cache, nll_BT[:, 0]
  B, T = batch['inputs_BT'].shape
  tokens = jnp.arange(T), batch['inputs_BT'].T, batch['targets_BT'].T
  _, nll_TB = lax.scan(one, model.init_cache(B, T, cache), tokens)
  return jnp.sum(nll_TB.T * batch['weights_BT']), jnp.sum(batch['weights_BT']), jnp.sum(batch['bytes_BT'])


def stream(model, prompt_BT, num_tokens: int, *, sampling=Sampling(), seed: int = 0, vocab_size: int,
           burst_size: int = 16, cache=specs.FloatCache()) -> Iterator[np.ndarray]:
  """Yields arrays of new token ids, (B, up to burst_size), until `num_tokens` are drawn.

  Args:
    model: made `ready` at each call, or once for all of them by the caller.
    prompt_BT: at least one token; all prompts of a batch have the same length.
    vocab_size: of the tokenizer; the model's padding of the vocabulary is never drawn.
    cache: the format of what is kept of the tokens read: see `models/spec.py`.
  """
  prompt_BT = jnp.asarray(prompt_BT, jnp.int32)
  if prompt_BT.shape[1] == 0: raise ValueError('prompt = []: must hold at least one token')
  num_bursts = -(-num_tokens // burst_size)
  start = prompt_BT.shape[1]
  model, key = ready(model), jax.random.key(seed)
  logits_BV, slots = settle(prefill(model, prompt_BT, length=start + num_bursts * burst_size, vocab_size=vocab_size,
                                    cache=cache))
  for i in range(num_bursts):
    ids, logits_BV, slots = burst(model, logits_BV, slots, start + i * burst_size, key, sampling,
                                  count=burst_size, vocab_size=vocab_size)
    yield np.asarray(ids)[:, :num_tokens - i * burst_size]
