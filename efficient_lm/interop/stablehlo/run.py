"""Runs the model in the folder of this file: greedy continuations of prompts, without the package that made it.

  python run.py 17,4,256,9 17,5 --tokens=16

continues the two prompts of these token ids and prints the ids drawn, a line for each. It needs `pip install jax
flatbuffers` and, for a GPU or TPU, jax's extra for that. Where it is imported instead, `Model(folder)` has both programs;
manifest.json says what they take and give.
"""
import argparse
import json
import mmap
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax import export


class Model:
  """The programs and weights of a folder.

  prefill(tokens_BT, lengths_B) -> logits_BV, cache: prompts, filled up on the right.
  decode(tokens_B, starts_B, cache) -> logits_BV, cache: one more token of each sequence, which takes the slot starts_B. The
  arrays of the cache that it is given are used up.
  """

  def __init__(self, folder):
    folder = pathlib.Path(folder)
    self.manifest = json.loads((folder / 'manifest.json').read_text())
    programs, self.length = self.manifest['programs'], self.manifest['length']
    prefill, decode = (export.deserialize(bytearray((folder / programs[name]['file']).read_bytes()))
                       for name in ('prefill', 'decode'))
    self._weights = [jax.device_put(array) for array in weights(folder / self.manifest['weights_file'], self.manifest)]
    # The cache, which follows the weights, the tokens and their slots, is updated in place.
    last = len(self._weights) + len(programs['decode']['arguments'])
    cache = range(len(self._weights) + 2, last)
    self._prefill, self._decode = jax.jit(prefill.call), jax.jit(decode.call, donate_argnums=cache)

  def prefill(self, tokens_BT, lengths_B):
    """See above. Raises ValueError for a prompt that is longer than the cache, or empty."""
    tokens_BT, lengths_B = np.asarray(tokens_BT, np.int32), np.asarray(lengths_B, np.int32)
    if tokens_BT.shape[1] > self.length:
      raise ValueError(f'a prompt of {tokens_BT.shape[1]} tokens: the cache has room for {self.length}')
    if not lengths_B.size or lengths_B.min() < 1: raise ValueError('an empty prompt: there is nothing to continue')
    logits_BV, *cache = self._prefill(*self._weights, tokens_BT, lengths_B)
    return logits_BV, cache

  def decode(self, tokens_B, starts_B, cache):
    """See above. Raises ValueError for a slot that the cache does not have."""
    starts_B = np.asarray(starts_B, np.int32)
    if starts_B.max() >= self.length: raise ValueError(f'token {starts_B.max()}: the cache has room for {self.length}')
    logits_BV, *cache = self._decode(*self._weights, jnp.asarray(tokens_B, jnp.int32), starts_B, *cache)
    return logits_BV, cache

  def greedy(self, prompts: list[list[int]], num_tokens: int) -> list[list[int]]:
    """The most likely tokens after each prompt: `num_tokens`, or fewer where one of them ends the text. Raises ValueError
    for more tokens than the cache has room for."""
    lengths_B = np.array([len(prompt) for prompt in prompts], np.int32)
    if lengths_B.max() + num_tokens > self.length:
      raise ValueError(f'{lengths_B.max()} + {num_tokens} tokens: the cache has room for {self.length}')
    tokens_BT = np.zeros((len(prompts), lengths_B.max()), np.int32)
    for row, prompt in zip(tokens_BT, prompts): row[:len(prompt)] = prompt
    logits_BV, cache = self.prefill(tokens_BT, lengths_B)
    drawn = [np.asarray(jnp.argmax(logits_BV, -1))]
    for i in range(num_tokens - 1):
      logits_BV, cache = self.decode(drawn[-1], lengths_B + i, cache)
      drawn.append(np.asarray(jnp.argmax(logits_BV, -1)))
    return [self._until_stop(row) for row in np.stack(drawn, 1).tolist()]

  def _until_stop(self, ids: list[int]) -> list[int]:
    ends = [i for i, drawn in enumerate(ids) if drawn in self.manifest['stops']]
    return ids[:ends[0]] if ends else ids


def weights(file, manifest: dict) -> list[np.ndarray]:
  """The weights in the order of the arguments, mapped from a file in the format safetensors. What that format has no dtype
  for is in it as bytes: the manifest knows the dtype."""
  with open(file, 'rb') as opened: mapped = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
  begin = 8 + int.from_bytes(mapped[:8], 'little')
  header = json.loads(mapped[8:begin])
  def array(argument):
    first, last = header[argument['name']]['data_offsets']
    raw = np.frombuffer(mapped, np.uint8, last - first, begin + first)
    return raw.view(jnp.dtype(argument['dtype'])).reshape(argument['shape'])
  return [array(argument) for argument in manifest['weights']]


def main():
  """Reads the command line."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('prompts', nargs='+', help='token ids, with commas between them')
  parser.add_argument('--tokens', type=int, default=16, help='how many to draw')
  words = parser.parse_args()
  try:
    prompts = [[int(part) for part in prompt.split(',')] for prompt in words.prompts]
    drawn = Model(pathlib.Path(__file__).parent).greedy(prompts, words.tokens)
  except ValueError as error: sys.exit(str(error))
  for ids in drawn: print(','.join(map(str, ids)))


if __name__ == '__main__': main()
