"""SmolLM2-135M with weights taken away: perplexity, zeros and CPU seconds, by every method; writes results.json and the
table of the README, a row as soon as it is measured:

  make smollm2
  python -m experiments.pruning.collect models/smollm2 calibration.npy test.npy ["SparseGPT, 50 %" …]

Both files hold rows of token ids: of WikiText-2, 16 or more of 512 tokens of its validation text and 8 of 1024 of its test
text. Names of rows measure these alone, anew. CPU seconds are of the stages alone, compiling included.
"""
import dataclasses
import sys
import time
from pathlib import Path

import jax
import numpy as np

from efficient_lm import commands
from efficient_lm.formats import FullRangeInt, Group
from efficient_lm.parallel.sharding import single_device_mesh
from efficient_lm.runs import measure
from efficient_lm.runs.allocator import use_huge_pages
from efficient_lm.techniques import (
  Erk,
  Global,
  Gptq,
  NofM,
  Owl,
  PruneOnce,
  Quantize,
  Random,
  Rule,
  Snip,
  SparseGpt,
  Taylor,
  Wanda,
)
from efficient_lm.training import evaluation
from experiments import collecting
from experiments.real_model.collect import SEQUENCES, Text, head_of, windows_of

INT4 = Rule(weights=FullRangeInt(bits=4, scales=Group(size=64), scale_dtype='float16'))


@dataclasses.dataclass(frozen=True)
class Variant:
  """A row of the table: what is done to the model. `peer`: the perplexity that a tool named in the README reaches with this
  method on these tokens, of its own float model, 29.20, and its CPU seconds where these are known."""
  stages: tuple = ()
  peer: float | None = None
  peer_seconds: float | None = None


def pruned(**fields) -> tuple:
  """One stage of pruning."""
  return (PruneOnce(sequences=SEQUENCES, **fields),)


def quantized(method) -> tuple:
  """One stage of quantization."""
  return (Quantize(rules=(INT4,), method=method, sequences=SEQUENCES),)


TWO_OF_FOUR = dict(pattern=NofM(n=2, m=4))
HALF = dict(sparsity=0.5)
MORE = dict(sparsity=0.7)
AFTER = lambda **fields: pruned(**fields) + quantized(Gptq())
VARIANTS = {
  'float32': Variant(peer=29.20),
  'random, 50 %': Variant(pruned(score=Random(), **HALF)),
  'magnitude, 50 %': Variant(pruned(**HALF), 536.9),
  'Wanda, 50 %': Variant(pruned(score=Wanda(), **HALF), 67.4, 88),
  'SparseGPT, 50 %': Variant(pruned(score=SparseGpt(), **HALF), 62.8, 134),
  'magnitude, 2:4': Variant(pruned(**TWO_OF_FOUR), 3266),
  'Wanda, 2:4': Variant(pruned(score=Wanda(), **TWO_OF_FOUR), 241.0),
  'SparseGPT, 2:4': Variant(pruned(score=SparseGpt(), **TWO_OF_FOUR), 123.8, 106),
  'SparseGPT, 50 %, and 4 bits in one pass': Variant(quantized(Gptq(**HALF)), 91.3, 225),
  'SparseGPT, 50 %, then GPTQ, 4 bits': Variant(AFTER(score=SparseGpt(), **HALF), 91.3, 225),
  'SparseGPT, 2:4, and 4 bits in one pass': Variant(quantized(Gptq(**TWO_OF_FOUR))),
  'GPTQ, 4 bits': Variant(quantized(Gptq()), 40.72, 106),
  'SparseGPT, 50 %, most active inputs first': Variant(pruned(score=SparseGpt(act_order=True), **HALF)),
  'Wanda, 50 %, OWL': Variant(pruned(score=Wanda(), allocation=Owl(), **HALF)),
  'Wanda, 70 %': Variant(pruned(score=Wanda(), **MORE)),
  'Wanda, 70 %, OWL': Variant(pruned(score=Wanda(), allocation=Owl(), **MORE)),
  'SparseGPT, 70 %': Variant(pruned(score=SparseGpt(), **MORE)),
  'SparseGPT, 70 %, OWL': Variant(pruned(score=SparseGpt(), allocation=Owl(), **MORE)),
  'magnitude, 50 %, ERK': Variant(pruned(allocation=Erk(), **HALF)),
  'magnitude, 50 %, global': Variant(pruned(allocation=Global(), **HALF)),
  'SNIP, 50 %': Variant(pruned(score=Snip(), **HALF)),
  'Taylor, 50 %': Variant(pruned(score=Taylor(), **HALF)),
  'Taylor, 50 %, global': Variant(pruned(score=Taylor(), allocation=Global(), **HALF)),
}


def measured(source, variant: Variant, text: Text, windows) -> dict:
  """The figures of a row."""
  model, notes, started = source.load(text.mesh), [], time.process_time()
  for stage in variant.stages:
    model, said = stage(model, text)
    notes += said
  jax.block_until_ready(jax.tree.leaves(model))
  seconds = time.process_time() - started if variant.stages else None
  found = evaluation.evaluate(model, windows(), text.mesh)
  nonzero = measure.nonzero_parameters(model) / measure.parameters(model).total
  return {'cpu_seconds': seconds, 'perplexity': found['perplexity'], 'tokens': found['tokens'], 'nonzero': nonzero,
          'notes': notes}


def collect(run: str, calibration: str, test: str, names: list[str], folder) -> dict:
  """Measures rows and writes each as soon as it is known; rows that stand in results.json already are kept."""
  source, mesh = commands.source_of(run), single_device_mesh()
  source = dataclasses.replace(source, parameters='float32')
  rows_RT, test_RT = np.load(calibration)[:SEQUENCES].astype(np.int32), np.load(test).astype(np.int32)
  windows, head = windows_of(test_RT, source.tokenizer()), head_of(rows_RT, test_RT)

  def row(name: str) -> dict:
    with jax.set_mesh(mesh): found = measured(source, VARIANTS[name], Text(rows_RT, mesh), windows)
    print(f'{name}: perplexity {found["perplexity"]:.2f}, {found["cpu_seconds"] or 0:.0f} CPU s', flush=True)
    return found
  return collecting.row_by_row(folder, head, VARIANTS, names, row, table)


def table(found: dict) -> str:
  """A line for each row that is measured."""
  def line(name: str, row: dict) -> list[str]:
    variant, seconds = VARIANTS[name], row['cpu_seconds']
    number = lambda value: '' if value is None else f'{value:.0f}'
    return [name, f'{row["perplexity"]:.2f}', '' if variant.peer is None else f'{variant.peer:g}', number(seconds),
            number(variant.peer_seconds), f'{row["nonzero"]:.1%}']
  headings = ['', 'perplexity', 'a peer', 'CPU s', 'its CPU s', 'not zero']
  return collecting.markdown(headings, [line(name, row) for name, row in found['rows'].items()])


if __name__ == '__main__':
  use_huge_pages()
  collect(*sys.argv[1:4], sys.argv[4:], Path(__file__).parent)
