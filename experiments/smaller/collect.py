"""SmolLM2-135M with less depth, width or hidden units: perplexity before any recovery, parameters, and the time to read a
prompt beside the whole model, in turns; writes results.json and the table of the README, a row as soon as it is measured:

  make smollm2
  python -m experiments.smaller.collect models/smollm2 calibration.npy test.npy ["layers 22" …]

The files are those of experiments/real_model. Names of rows measure these alone, anew. Other programs falsify the times, and
only those.
"""
import dataclasses
import functools
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from efficient_lm import commands
from efficient_lm.compression.budget import Budget, Grid
from efficient_lm.compression.counting import parameters
from efficient_lm.compression.group_scores import Activations, BlockInfluence
from efficient_lm.compression.scores import Magnitude, Random, Taylor
from efficient_lm.compression.shape import Shape
from efficient_lm.models import decode, spec
from efficient_lm.parallel.sharding import single_device_mesh
from efficient_lm.runs import ledger, measure
from efficient_lm.runs.allocator import use_huge_pages
from efficient_lm.techniques import Shrink
from efficient_lm.training import evaluation
from experiments import collecting
from experiments.real_model.collect import PROMPT, SEQUENCES, Text, windows_of

PEER_WINDOWS = 4   # of the test text, that those who are compared with read; their float model has 23.10


@dataclasses.dataclass(frozen=True)
class Variant:
  """A row of the table. timed: whether reading a prompt is timed; peer: the perplexity over the first windows that
  Minitron's importance, written in PyTorch, reaches with this shape on these tokens."""
  stage: Shrink | None = None
  timed: bool = False
  peer: float | None = None


def shrink(to, *scores) -> Shrink:
  """The stage, by some scores or by those that it has by itself."""
  return Shrink(to=to, sequences=SEQUENCES, **(dict(scores=scores) if scores else {}))


WIDE, DEEP, THIN = Shape(width=512, hidden=1152), Shape(layers=22), Shape(hidden=0.75)
BUDGET = Budget(parameters=0.75, trials=6, grid=Grid(width=(576, 512, 448), hidden=(1536, 1280, 1024), layers=(
  30, 28, 26, 24, 22, 20)))
VARIANTS = {
  'whole': Variant(),
  'layers 22': Variant(shrink(DEEP), timed=True, peer=101.8),
  'layers 22, by Taylor': Variant(shrink(DEEP, Taylor())),
  'layers 22, by chance': Variant(shrink(DEEP, Random())),
  'layers 20': Variant(shrink(Shape(layers=20)), timed=True),
  'width 512, hidden 1152': Variant(shrink(WIDE), timed=True, peer=149.1),
  'width 512, hidden 1152, by Taylor': Variant(shrink(WIDE, Taylor())),
  'hidden 1152': Variant(shrink(THIN)),
  'hidden 1152, by Taylor': Variant(shrink(THIN, Taylor())),
  'hidden 1152, by magnitude': Variant(shrink(THIN, Magnitude())),
  'hidden 1152, by chance': Variant(shrink(THIN, Random())),
  'a budget of 75 % of parameters': Variant(shrink(BUDGET, Activations(), BlockInfluence()), timed=True),
  'half the hidden units': Variant(shrink(Shape(hidden=0.5)), timed=True),
  'half the width and hidden units': Variant(shrink(Shape(width=0.5, hidden=0.5)), timed=True),
}


def measured(source, variant: Variant, text: Text, windows) -> dict:
  """The figures of a row."""
  whole, notes = source.load(text.mesh), ()
  started = time.process_time()
  model = whole
  if variant.stage is not None: model, notes = variant.stage(whole, text)
  jax.block_until_ready(jax.tree.leaves(model))
  figures = {'cpu_seconds': None if variant.stage is None else time.process_time() - started,
             'parameters': parameters(model).total, 'share': parameters(model).total / parameters(whole).total,
             'notes': list(notes)}
  figures['perplexity'] = evaluation.evaluate(model, windows(None), text.mesh)['perplexity']
  figures['perplexity_of_first'] = evaluation.evaluate(model, windows(PEER_WINDOWS), text.mesh)['perplexity']
  if variant.timed: figures |= times(whole, model, text.rows_RT)
  return figures


def times(whole, model, rows_RT) -> dict:
  """Median seconds of reading PROMPT tokens, batch 1, of both models in turns."""
  prompt_BT, form = jnp.asarray(rows_RT[:1, :PROMPT]), spec.FloatCache()
  ready = {'whole': decode.ready(whole), 'smaller': decode.ready(model)}
  def read(one):
    return decode.prefill(one, prompt_BT, length=PROMPT, vocab_size=one.embed.shape[0], cache=form)
  found = measure.interleaved({name: functools.partial(read, one) for name, one in ready.items()}, 7)
  seconds = {name: float(np.median(each)) for name, each in found.items()}
  return {'whole_seconds': seconds['whole'], 'seconds': seconds['smaller']}


def collect(run: str, calibration: str, test: str, names: list[str], folder) -> dict:
  """Measures rows and writes each as soon as it is known; rows that stand in results.json already are kept."""
  source, mesh = commands.source_of(run), single_device_mesh()
  rows_RT, test_RT = np.load(calibration)[:SEQUENCES].astype(np.int32), np.load(test).astype(np.int32)
  windows = lambda count: windows_of(test_RT[:count], source.tokenizer())()
  head = {'date': collecting.today(), 'hardware': ledger.hardware(), 'versions': ledger.versions()}

  def row(name: str) -> dict:
    with jax.set_mesh(mesh): found = measured(source, VARIANTS[name], Text(rows_RT, mesh), windows)
    print(f'{name}: perplexity {found["perplexity"]:.2f}, {found["share"]:.1%} of the parameters', flush=True)
    return found
  return collecting.row_by_row(folder, head, VARIANTS, names, row, table)


def table(found: dict) -> str:
  """A line for each row that is measured."""
  def line(name: str, row: dict) -> list[str]:
    peer, seconds, faster = VARIANTS[name].peer, row['cpu_seconds'], ''
    if 'seconds' in row: faster = f'{row["seconds"]:.2f} and {row["whole_seconds"]:.2f}'
    return [name, f'{row["parameters"] / 1e6:.1f}', f'{row["perplexity"]:.1f}', f'{row["perplexity_of_first"]:.1f}',
            '' if peer is None else f'{peer:g}', '' if seconds is None else f'{seconds:.0f}', faster]
  headings = ['', 'M parameters', 'perplexity', 'of the first 4 windows', 'a peer', 'CPU s', 's to read 512; the whole']
  return collecting.markdown(headings, [line(name, row) for name, row in found['rows'].items()])


if __name__ == '__main__':
  use_huge_pages()
  collect(*sys.argv[1:4], sys.argv[4:], Path(__file__).parent)
