"""SmolLM2-135M in few bits: perplexity, bytes, decoding and reading a prompt, by every method; writes results.json and the
table of the README, a row as soon as it is measured:

  make smollm2
  python -m experiments.real_model.collect models/smollm2 calibration.npy test.npy ["GPTQ, 3 bits" …]

Both files hold rows of token ids: of WikiText-2, 16 or more of 512 tokens of its validation text and 8 of 1024 of its test
text. Names of rows measure these alone, anew. Other programs falsify the times, and only those.
"""
import dataclasses
import functools
import hashlib
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from efficient_lm import commands
from efficient_lm.data.packing import Rows, Stream
from efficient_lm.data.pipeline import in_sequence
from efficient_lm.formats import FullRangeInt, Group, Int
from efficient_lm.formats.ranges import MeanSquaredError
from efficient_lm.models import decode, spec
from efficient_lm.parallel.sharding import single_device_mesh
from efficient_lm.runs import ledger, measure
from efficient_lm.runs.allocator import use_huge_pages
from efficient_lm.techniques import Awq, Gptq, Quantize, Rotate, RoundToNearest, Rule, SmoothQuant
from efficient_lm.training import evaluation
from efficient_lm.tree import num_bytes
from experiments import collecting

SEQUENCES, AT_ONCE = 16, 4       # of calibration, as those who are compared with used, and of a batch
PROMPT, TOKENS, SLOTS = 512, 32, 1024
G = Group(size=64)
files = lambda bits: FullRangeInt(bits=bits, scales=G, scale_dtype='float16')
uneven = lambda bits: Int(bits=bits, symmetric=False, scales=G)


@dataclasses.dataclass(frozen=True)
class Variant:
  """A row of the table: what is done to the model, the cache that it is read through, or None for whole windows; `peer`:
  the perplexity that a tool named in the README reaches with this method and grid on these tokens, of its own float model,
  29.20."""
  stages: tuple = ()
  cache: object = None
  peer: float | None = None
  dtype: str = 'float32'


def quantized(method, weights, activations=None, before=(), *rules) -> tuple:
  """The stage of PTQ on the layers."""
  rules = (Rule(weights=weights, activations=activations), *rules)
  return (Quantize(rules=rules, method=method, before=before, sequences=SEQUENCES),)


RTN = RoundToNearest()
VARIANTS = {
  'float32': Variant(),
  'bfloat16': Variant(dtype='bfloat16', peer=29.20),
  'RTN, 8 bits': Variant(quantized(RTN, Int())),
  'RTN, W8A8': Variant(quantized(RTN, Int(), Int())),
  'SmoothQuant, W8A8': Variant(quantized(RTN, Int(), Int(), (SmoothQuant(sequences=SEQUENCES),))),
  'RTN, 4 bits': Variant(quantized(RTN, files(4)), peer=41.82),
  'AWQ, 4 bits': Variant(quantized(Awq(), files(4))),
  'GPTQ, 4 bits': Variant(quantized(Gptq(), files(4)), peer=40.72),
  'GPTQ, 4 bits, ranges of least error': Variant(quantized(Gptq(range=MeanSquaredError()), files(4))),
  'the same, embedding in 8': Variant(quantized(
    Gptq(range=MeanSquaredError()), files(4), None, (),
    Rule(where='embed|own_head', weights=Int(scales=Group(size=32), scale_dtype='float16')))),
  'RTN, 3 bits': Variant(quantized(RTN, files(3)), peer=216.3),
  'AWQ, 3 bits': Variant(quantized(Awq(), files(3)), peer=201.4),
  'GPTQ, 3 bits': Variant(quantized(Gptq(), files(3)), peer=163.7),
  'GPTQ, 3 bits, ranges of least error': Variant(quantized(Gptq(range=MeanSquaredError()), files(3))),
  'RTN, 3 bits, asymmetric': Variant(quantized(RTN, uneven(3))),
  'AWQ, 3 bits, asymmetric': Variant(quantized(Awq(), uneven(3))),
  'AWQ, 3 bits, asymmetric, unclipped': Variant(quantized(Awq(clips=1), uneven(3))),
  'GPTQ, 3 bits, asymmetric': Variant(quantized(Gptq(), uneven(3))),
  'GPTQ, 3 bits, asymmetric, ranges of least error': Variant(quantized(Gptq(range=MeanSquaredError()), uneven(3))),
  'RTN, W4A4': Variant(quantized(RTN, files(4), Int(bits=4))),
  'rotated, RTN, W4A4': Variant(quantized(RTN, files(4), Int(bits=4), (Rotate(),))),
  'rotated, GPTQ, W4A4': Variant(quantized(Gptq(range=MeanSquaredError()), files(4), Int(bits=4), (Rotate(),))),
  'cache in int8': Variant(cache=spec.IntegerCache(bits=8)),
  'cache in int4': Variant(cache=spec.TiledCache()),
}


@dataclasses.dataclass
class Text:
  """What stages ask of their context: a mesh, a key, and batches, here of rows of ids, each one a document."""
  rows_RT: np.ndarray
  mesh: object
  key: object = dataclasses.field(default_factory=lambda: jax.random.key(0))

  def batches(self, count: int) -> Iterator[dict[str, np.ndarray]]:
    """`count` of them at most."""
    for start in range(0, min(count * AT_ONCE, len(self.rows_RT)), AT_ONCE):
      tokens_BT = self.rows_RT[start:start + AT_ONCE]
      place_BT = np.tile(np.arange(tokens_BT.shape[1], dtype=np.int32), (len(tokens_BT), 1))
      followed_BT = place_BT + 1 < tokens_BT.shape[1]   # the last token of a row is not
      yield {'inputs_BT': tokens_BT, 'positions_BT': place_BT, 'segments_BT': np.ones_like(place_BT),
             'targets_BT': np.roll(tokens_BT, -1, 1), 'weights_BT': followed_BT.astype(np.float32)}


def measured(source, variant: Variant, text: Text, windows) -> dict:
  """The figures of a row."""
  source = dataclasses.replace(source, parameters=variant.dtype)
  model, started = source.load(text.mesh), time.process_time()
  for stage in variant.stages: model, _ = stage(model, text)
  jax.block_until_ready(jax.tree.leaves(model))
  figures = {'cpu_seconds': time.process_time() - started if variant.stages else None,
             'bytes': num_bytes(model), 'bits_a_parameter': measure.bits_per_parameter(model)}
  form = variant.cache or spec.FloatCache()
  empty = jax.eval_shape(functools.partial(model.init_cache, 1, SLOTS, form))
  figures['cache_bytes_a_token'] = num_bytes(empty) / SLOTS
  if variant.cache is None: found = evaluation.evaluate(model, windows(), text.mesh)
  model = decode.ready(model, donate=True)
  if variant.cache is not None:
    found = evaluation.evaluate(model, windows(), text.mesh, functools.partial(decode.cached_sums, cache=form))
  return figures | {'perplexity': found['perplexity'], 'tokens': found['tokens']} | speed(model, text.rows_RT, form)


def speed(model, rows_RT, form) -> dict:
  """Seconds of reading PROMPT tokens, and from one greedy token after them to the next; batch 1."""
  prompt_BT, vocab_size = jnp.asarray(rows_RT[:1, :PROMPT]), model.embed.shape[0]
  read = lambda: decode.prefill(model, prompt_BT, length=PROMPT + TOKENS, vocab_size=vocab_size, cache=form)
  logits_BV, cache = read()
  def draw():
    return decode.burst(model, logits_BV, jax.tree.map(lambda a: a.copy(), cache), PROMPT, jax.random.key(0),
                        decode.Sampling(temperature=0.0), count=TOKENS, vocab_size=vocab_size)[0]
  return {'prefill_seconds': measure.time_call(read, 3), 'token_seconds': measure.time_call(draw) / TOKENS}


def windows_of(test_RT, tokenizer):
  """A function that gives the batches of test text, a row each."""
  stream = Stream(test_RT.reshape(-1), np.arange(len(test_RT), dtype=np.int64) * test_RT.shape[1], tokenizer.bytes_V)
  return lambda: in_sequence(Rows(stream, test_RT.shape[1]), batch_size=1)


def head_of(rows_RT, test_RT) -> dict:
  """What all rows of a table depend on: the machine, versions and text."""
  digest = lambda ids: hashlib.sha256(np.ascontiguousarray(ids, '<i4').tobytes()).hexdigest()[:16]
  return {'date': collecting.today(), 'hardware': ledger.hardware(), 'versions': ledger.versions(),
          'calibration': digest(rows_RT), 'test': digest(test_RT)}


def collect(run: str, calibration: str, test: str, names: list[str], folder) -> dict:
  """Measures rows and writes each as soon as it is known; rows that stand in results.json already are kept."""
  source, mesh = commands.source_of(run), single_device_mesh()
  rows_RT, test_RT = np.load(calibration)[:SEQUENCES].astype(np.int32), np.load(test).astype(np.int32)
  windows, head = windows_of(test_RT, source.tokenizer()), head_of(rows_RT, test_RT)

  def row(name: str) -> dict:
    with jax.set_mesh(mesh): found = measured(source, VARIANTS[name], Text(rows_RT, mesh), windows)
    print(f'{name}: perplexity {found["perplexity"]:.2f}, {found["token_seconds"] * 1e3:.1f} ms a token', flush=True)
    return found
  return collecting.row_by_row(folder, head, VARIANTS, names, row, table)


def table(found: dict) -> str:
  """A line for each row that is measured."""
  def line(name: str, row: dict) -> list[str]:
    peer, seconds = VARIANTS[name].peer, row['cpu_seconds']
    return [name, f'{row["perplexity"]:.2f}', '' if peer is None else f'{peer:g}', f'{row["bytes"] / 1e6:.0f}',
            f'{row["cache_bytes_a_token"]:.0f}', '' if seconds is None else f'{seconds:.0f}',
            f'{row["token_seconds"] * 1e3:.1f}', f'{row["prefill_seconds"]:.2f}']
  headings = ['', 'perplexity', 'a peer', 'MB', 'cache, bytes a token', 'CPU s', 'ms a token', 's to read 512']
  return collecting.markdown(headings, [line(name, row) for name, row in found['rows'].items()])


if __name__ == '__main__':
  use_huge_pages()
  collect(*sys.argv[1:4], sys.argv[4:], Path(__file__).parent)
