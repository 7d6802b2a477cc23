"""Text from a model: the prompt is read once into a KV cache, then tokens are drawn in jitted bursts."""
import dataclasses
import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from efficient_lm.models import spec as specs
from efficient_lm.models.cache import padded
from efficient_lm.models.transformer import Repeated, Stack, Unrolled
from efficient_lm.parallel.processes import fetched
from efficient_lm.parallel.sharding import wait_on_cpu
from efficient_lm.tree import rewrite
from efficient_lm.weights.weight import Dense, Weight

GREEDY = 1e-6   # a temperature below this counts as 0: logits divided by it would overflow
HOT = 1e30      # one above this counts as this: all tokens are alike, and larger numbers are infinite in float32
TINY = float(np.finfo(np.float32).tiny)   # smaller numbers are 0 in float32, and a top_p of 0 would keep no token


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Sampling:
  """How a token is drawn. temperature 0 takes the most likely one; `top_k` keeps the k most likely; `top_p` keeps the
  smallest set of most likely tokens whose probability reaches p (Holtzman et al. 2020)."""
  temperature: float = 1.0
  top_k: int | None = None
  top_p: float | None = None

  def __post_init__(self):
    if not 0 <= self.temperature < float('inf'):
      raise ValueError(f'temperature = {self.temperature}: must be 0 (greedy) or positive and finite')
    if self.top_k is not None and self.top_k < 1: raise ValueError(f'top_k = {self.top_k}: must be at least 1')
    if self.top_p is not None and not 0 < self.top_p <= 1: raise ValueError(f'top_p = {self.top_p}: must be in (0, 1]')

  def __call__(self, logits_BV, key):
    """ids_B drawn from the kept tokens."""
    if self.temperature < GREEDY: return most_likely(logits_BV)
    return jax.random.categorical(key, self.keep(logits_BV))

  def keep(self, logits_BV):
    """logits / temperature, -inf where a token may not be drawn. Logits are compared before they are divided: a large
    temperature makes them all equal."""
    temperature = min(self.temperature, HOT)
    if self.top_k is not None:
      least_B1 = lax.top_k(logits_BV, min(self.top_k, logits_BV.shape[-1]))[0][:, -1:]
      logits_BV = jnp.where(logits_BV >= least_B1, logits_BV, -jnp.inf)
    if self.top_p is not None and self.top_p < 1:
      sorted_BV = jnp.sort(logits_BV, descending=True)
      probs_BV = jax.nn.softmax(sorted_BV / temperature)
      before_BV = jnp.cumsum(probs_BV, -1) - probs_BV
      least_B1 = jnp.min(jnp.where(before_BV < max(self.top_p, TINY), sorted_BV, jnp.inf), -1, keepdims=True)
      logits_BV = jnp.where(logits_BV >= least_B1, logits_BV, -jnp.inf)
    return logits_BV / temperature


def most_likely(logits_BV):
  """ids_B as `jnp.argmax` gives them: the first of the largest, or of NaN. XLA:CPU vectorizes each of these two reductions
  and not that of pairs, which takes 5 times as long for 8 rows of 49,152."""
  best_B1 = jnp.max(logits_BV, -1, keepdims=True)
  id_BV = lax.broadcasted_iota(jnp.int32, logits_BV.shape, 1)
  return jnp.min(jnp.where((logits_BV == best_B1) | jnp.isnan(logits_BV), id_BV, logits_BV.shape[1]), -1)


def ready(model, donate: bool = False):
  """The model as decoding reads it: every layer by itself, and on a CPU the weights as few rows are multiplied by them
  fastest (`Weight.for_decoding`); the model itself if that is what it is. Of weights that lie over several devices, experts
  and those in few bits stay as they are. With `donate` the arrays of the given model are deleted one by one as they are
  copied, so that there are never two copies of the whole."""
  stacked = any(isinstance(stack, (Stack, Repeated)) for stack in model.stacks)
  made = model
  if stacked:
    made = jax.tree.map(lambda leaf: leaf, model)
    made.stacks = nnx.List([stack if isinstance(stack, Unrolled) else _apart(stack, donate) for stack in model.stacks])
  changed = False
  def change(_, weight):
    nonlocal changed
    new = _for_decoding(weight, donate)
    changed |= new is not weight
    return new
  if jax.default_backend() == 'cpu': made = rewrite(made, Weight, change)
  return wait_on_cpu(made) if stacked or changed else model


def _apart(stack: Stack | Repeated, donate: bool) -> Unrolled:
  if isinstance(stack, Stack): layers = _layers(stack.blocks, stack.num_layers, donate)
  else:
    places = [_layers(block, stack.num_repeats, donate) for block in stack.blocks]
    layers = [layer for repeat in zip(*places) for layer in repeat]
  return Unrolled(layers, stack.remat)


def _layers(blocks, count: int, donate: bool) -> list:
  leaves, structure = jax.tree.flatten(blocks)
  parts = []
  for leaf in leaves:
    parts.append([_at(leaf, i) for i in range(count)])
    if donate: leaf.delete()
  return [jax.tree.unflatten(structure, layer) for layer in zip(*parts)]


@jax.jit
def _at(leaf, i):
  return leaf[i]


def _for_decoding(weight: Weight, donate: bool) -> Weight:
  alone = all(len(leaf.sharding.device_set) == 1 for leaf in jax.tree.leaves(weight))
  if not alone and not (isinstance(weight, Dense) and 'E' not in weight.axes): return weight
  made = weight.for_decoding()
  if donate and made is not weight:
    kept = {id(leaf) for leaf in jax.tree.leaves(made)}   # an array that stays as it is, such as codes of 8 bits
    for leaf in jax.tree.leaves(weight):
      if id(leaf) not in kept: leaf.delete()
  return made


@functools.partial(jax.jit, static_argnames=('length', 'vocab_size', 'cache'))
def prefill(model, prompt_BT, lengths_B=None, *, length: int, vocab_size: int, cache=specs.FloatCache()):
  """Reads the prompt into a cache of `length` slots: the logits after its last token, (B, vocab_size), and the cache.

  lengths_B: of prompts that are filled up on the right. What follows a prompt is not seen by it, and the tokens drawn take
  its slots one by one before any of them sees it.
  """
  empty = model.init_cache(prompt_BT.shape[0], length, cache)
  if lengths_B is not None: empty = padded(empty, lengths_B, prompt_BT.shape[1])
  outputs = model(prompt_BT, cache=empty)
  if lengths_B is None: hidden_BTD = outputs.hidden_BTD[:, -1:]
  else: hidden_BTD = jnp.take_along_axis(outputs.hidden_BTD, lengths_B[:, None, None] - 1, axis=1)
  return dataclasses.replace(outputs, hidden_BTD=hidden_BTD).logits_BTV[:, 0, :vocab_size], outputs.cache


@functools.partial(jax.jit, static_argnames=('count', 'vocab_size'), donate_argnames='cache')
def burst(model, logits_BV, cache, start, key, sampling, *, count: int, vocab_size: int):
  """Draws `count` tokens: ids (B, count), and the logits and cache after the last of them. start: the slot of the first one,
  or one for each row, start_B.

  Token i of the text (of the longest one, if they differ) uses the key folded with i, so that a text does not depend on how
  it was cut into bursts.
  """
  def one(carry, index):
    logits_BV, cache = carry
    ids_B = sampling(logits_BV, jax.random.fold_in(key, jnp.max(index)))
    outputs = model(ids_B[:, None], cache=cache, start=index)
    return (outputs.logits_BTV[:, 0, :vocab_size], outputs.cache), ids_B
  (logits_BV, cache), ids = lax.scan(one, (logits_BV, cache), start + jnp.arange(count).reshape(-1, *[1] * jnp.ndim(start)))
  return ids.T, logits_BV, cache


@functools.partial(jax.jit, static_argnames=('cache',))
def cached_sums(model, batch, cache=specs.FloatCache()):
  """Nats, counted targets and bytes of text of one batch, as `training.evaluation.evaluation_sums`, but decoded: each row
  token by token through a cache of this format, the next token being that of the text. A row is one text, whatever documents
  it holds."""
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
           burst_size: int = 16, cache=specs.FloatCache(), stops: tuple[int, ...] = (),
           width: int = 0) -> Iterator[np.ndarray]:
  """Yields arrays of new token ids, (B, up to burst_size), until `num_tokens` are drawn or each row has reached a stop.

  Args:
    model: made `ready` at each call, or once for all of them by the caller.
    prompt_BT: at least one token each. Rows may be of several lengths: each is continued as it would be alone.
    vocab_size: of the tokenizer; the model's padding of the vocabulary is never drawn.
    cache: the format of what is kept of the tokens read: see `models/spec.py`.
    stops: ids that end a row. All ids after its first stop are that stop.
    width: prompts are filled up to so many tokens at least, so that prompts of other lengths are read by the same program.

  Raises:
    ValueError: an empty prompt; at the first token that is asked for.
    IncompatibleError: more tokens than the model has positions; likewise.
  """
  prompt_BT, lengths_B = _filled(prompt_BT, width)
  num_bursts = -(-num_tokens // burst_size)
  longest = prompt_BT.shape[1]
  start = longest if lengths_B is None else lengths_B
  model.refuse_longer(longest + num_tokens)
  # The last burst goes on past what is asked for, but not past the model's positions.
  length = min(longest + num_bursts * burst_size, model.max_length or longest + num_bursts * burst_size)
  model, key = ready(model), jax.random.key(seed)
  logits_BV, slots = wait_on_cpu(prefill(model, prompt_BT, lengths_B, length=length, vocab_size=vocab_size, cache=cache))
  ended_B = np.full(prompt_BT.shape[0], -1)
  for i in range(num_bursts):
    drawn = i * burst_size
    ids, logits_BV, slots = burst(model, logits_BV, slots, start + drawn, key, sampling, vocab_size=vocab_size,
                                  count=min(burst_size, length - longest - drawn))
    ids_BT, ended_B = _ended(fetched(ids)[:, :num_tokens - drawn], ended_B, stops)
    yield ids_BT
    if (ended_B >= 0).all(): return


def _filled(prompts, width: int):
  """Prompts as one array of at least `width` columns, shorter ones filled up on the right, and their lengths, or None where
  nothing is filled up."""
  lengths = [len(row) for row in prompts]
  if not lengths or not min(lengths): raise ValueError('prompt = []: must hold at least one token')
  width = max(*lengths, width)
  if min(lengths) == width: return jnp.asarray(prompts, jnp.int32), None
  filled_BT = np.zeros((len(lengths), width), np.int32)
  for row, prompt in zip(filled_BT, prompts, strict=True): row[:len(prompt)] = prompt
  return jnp.asarray(filled_BT), jnp.asarray(lengths, jnp.int32)


def _ended(ids_BT, ended_B, stops):
  """The ids with everything after a row's first stop replaced by that stop, cut after the id at which the last row stops;
  and the stop that each row has reached, -1 for none."""
  ids_BT = np.where(ended_B[:, None] >= 0, ended_B[:, None], ids_BT)
  hit_BT = np.isin(ids_BT, stops)
  first_B = np.where(hit_BT.any(1), hit_BT.argmax(1), ids_BT.shape[1])
  stop_B = np.where(hit_BT.any(1), ids_BT[np.arange(len(ids_BT)), np.minimum(first_B, ids_BT.shape[1] - 1)], -1)
  ids_BT = np.where(np.arange(ids_BT.shape[1]) > first_B[:, None], stop_B[:, None], ids_BT)
  ended_B = np.maximum(ended_B, stop_B)
  return (ids_BT[:, :first_B.max() + 1] if (ended_B >= 0).all() else ids_BT), ended_B


def until_stop(ids_T, stops: tuple[int, ...]):
  """A row's ids before its first stop."""
  found = np.flatnonzero(np.isin(ids_T, stops))
  return ids_T[:found[0]] if len(found) else ids_T
