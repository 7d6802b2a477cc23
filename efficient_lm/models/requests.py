"""What an evaluation harness asks of a model: how likely a continuation is, and how it goes on itself."""
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from efficient_lm.models import decode

ROWS = 1024     # tokens whose logits are there at a time
TOKENS = 4096   # that are read at once, padding counted
Pair = tuple[Sequence[int], Sequence[int]]   # ids of a context, at least one, and of what continues it


def over_pieces(function, arrays: tuple, rows: int = ROWS):
  """The sum of function(*piece) over pieces of about `rows` tokens of arrays (B, T, …), one after the other, so that what a
  function makes of all logits is never there whole. The last piece is filled up with zeros; the mesh never splits T."""
  B, T = arrays[0].shape[:2]
  width = min(T, max(1, rows // B))
  pieces = -(-T // width)

  def cut(array):
    padded = jnp.pad(array, [(0, 0), (0, pieces * width - T), *[(0, 0)] * (array.ndim - 2)])
    return jnp.moveaxis(padded.reshape(B, pieces, width, *array.shape[2:]), 1, 0)
  found = lax.map(lambda piece: function(*piece), tuple(map(cut, arrays)))
  return jax.tree.map(lambda leaf: jnp.sum(leaf, 0), found)


@jax.jit
def continuation_sums(model, inputs_BT, lengths_B, targets_BC, counts_B):
  """Of rows whose last `counts_B` of `lengths_B` inputs have the continuation as their targets, which stands on the right of
  targets_BC: the log-likelihood of it, float32 (B,), and the number of its tokens that were not the likeliest one."""
  B, T = inputs_BT.shape
  C = targets_BC.shape[1]
  segments_BT = (jnp.arange(T) < lengths_B[:, None]).astype(jnp.int32)
  outputs = model(inputs_BT, jnp.broadcast_to(jnp.arange(T), (B, T)), segments_BT)
  at_BC = jnp.maximum(lengths_B[:, None] - C + jnp.arange(C), 0)
  hidden_BCD = jnp.take_along_axis(outputs.hidden_BTD, at_BC[..., None], 1)
  real_BC = jnp.arange(C) >= C - counts_B[:, None]

  def piece(hidden_BcD, targets_Bc, real_Bc):
    logits_BcV = outputs.head.contract('BTD,DV->BTV', hidden_BcD, jnp.float32)
    found_Bc = jnp.take_along_axis(logits_BcV, targets_Bc[..., None], -1)[..., 0] - jax.nn.logsumexp(logits_BcV, -1)
    missed_Bc = jnp.argmax(logits_BcV, -1) != targets_Bc
    return jnp.sum(jnp.where(real_Bc, found_Bc, 0), 1), jnp.sum(real_Bc & missed_Bc, 1)
  return over_pieces(piece, (hidden_BCD, targets_BC, real_BC))


def score(model, pairs: Sequence[Pair], *, longest: int, at_once: int | None = None) -> Iterator[tuple[int, float, bool]]:
  """(number of the pair, log-likelihood in nats of its continuation after its context, whether greedy decoding would give
  it), the longest pairs first, so that one batch holds texts of about one length.

  longest: tokens that the model reads of a text; of longer ones the last are read. at_once: rows of a batch (None: as many
  as TOKENS holds). Raises ValueError for a continuation that is longer than the model reads, and for an empty context.
  """
  texts = [(*context, *continuation)[-longest - 1:] for context, continuation in pairs]
  for context, continuation in pairs:
    if not len(context): raise ValueError('context = []: must hold at least one token')
    if len(continuation) > longest: raise ValueError(f'a continuation of {len(continuation)} tokens: {longest} are read')
  order = sorted(range(len(pairs)), key=lambda i: -len(texts[i]))
  while order:
    T = min(rounded(len(texts[order[0]]) - 1), longest)
    rows = min(at_once or max(1, TOKENS // T), rounded(len(order)))
    chosen, order = order[:rows], order[rows:]
    C = min(T, rounded(max(len(pairs[i][1]) for i in chosen)))
    yield from zip(chosen, *_scored(model, [(texts[i], len(pairs[i][1])) for i in chosen], rows, T, C))


def _scored(model, texts: list[tuple[tuple[int, ...], int]], rows: int, T: int, C: int) -> tuple[list[float], list[bool]]:
  """Of texts and the lengths of their continuations, as a batch of `rows` rows, those without a text empty."""
  inputs_BT, targets_BC = np.zeros((rows, T), np.int32), np.zeros((rows, C), np.int32)
  lengths_B, counts_B = np.zeros(rows, np.int32), np.zeros(rows, np.int32)
  for row, (ids, count) in enumerate(texts):
    inputs_BT[row, :len(ids) - 1] = ids[:-1]
    lengths_B[row], counts_B[row] = len(ids) - 1, count
    if count: targets_BC[row, C - count:] = ids[len(ids) - count:]
  found_B, missed_B = map(np.asarray, continuation_sums(model, inputs_BT, lengths_B, targets_BC, counts_B))
  return found_B[:len(texts)].tolist(), (missed_B[:len(texts)] == 0).tolist()


def rounded(length: int) -> int:
  """The next of 8, 12, 16, 24, 32, 48 …: texts of many lengths share a few programs."""
  size = 8
  while size < length and size * 3 // 2 < length: size *= 2
  return size if length <= size else size * 3 // 2


def continued(model, tokenizer, prompts: Sequence[Sequence[int]], *, until: Sequence[str], num_tokens: int,
              sampling=decode.Sampling(0), seed: int = 0) -> list[str]:
  """What the model adds to each prompt: at most `num_tokens` tokens, up to the first of the texts `until`, which is left
  out, or of the tokenizer's stops.

  Prompts, of at least one token, are filled up to a length that others share (`rounded`). Bytes that are no text are
  replaced. Raises IncompatibleError for more tokens than the model has positions.
  """
  ends = [end.encode('utf-8', 'surrogateescape') for end in until if end]
  width = rounded(max(map(len, prompts)))
  if model.max_length is not None: width = min(width, model.max_length - num_tokens)
  drawn, texts = [[] for _ in prompts], [b''] * len(prompts)
  for ids_BT in decode.stream(model, prompts, num_tokens, sampling=sampling, seed=seed, vocab_size=tokenizer.vocab_size,
                              stops=tokenizer.stops, width=width):
    for row, ids in zip(drawn, ids_BT): row += ids.tolist()
    kept = [decode.until_stop(np.array(row), tokenizer.stops) for row in drawn]
    texts = [tokenizer.decode_bytes(ids) for ids in kept]
    if all(len(ids) < len(row) or any(end in text for end in ends) for ids, row, text in zip(kept, drawn, texts)): break
  firsts = [min((text.find(end) for end in ends if end in text), default=len(text)) for text in texts]
  return [text[:first].decode('utf-8', 'replace') for text, first in zip(texts, firsts)]
