"""Reads the held-out text of a run through every cache, token by token as generation does, and writes results.json and the
table of the README:

  python -m experiments.caches.collect runs/pillars/moe-0
"""
import functools
import sys
from pathlib import Path

import jax

from efficient_lm.config import experiment
from efficient_lm.models import decode, spec
from efficient_lm.parallel.sharding import single_device_mesh
from efficient_lm.runs import FromRun, ledger
from efficient_lm.training.evaluation import evaluate
from efficient_lm.tree import num_bytes
from experiments import collecting

SLOTS = 4096
CACHES = {'float': spec.FloatCache(), 'int4, tiles': spec.TiledCache(), **{
  f'int{bits}, {name}': spec.IntegerCache(bits=bits, group=group)
  for bits in (8, 4) for name, group in (('a scale a token', 1), ('a scale 32 tokens', 32))}}


def collect(workdir) -> dict:
  """Bits per byte through each cache and without one, and bytes a token of a cache of SLOTS tokens."""
  source, mesh = FromRun(path=str(workdir)), single_device_mesh()
  train, data = experiment.read(str(workdir)).train, experiment.read(str(workdir)).data
  corpus = data.open(seed=0, tokenizer=source.tokenizer())
  batches = lambda: corpus.eval_batches(rows=train.batch_size, sequence_length=train.sequence_length)
  with jax.set_mesh(mesh):
    model = source.load(mesh)
    ready, rows = decode.ready(model), []
    found = evaluate(model, batches(), mesh)
    for name, form in CACHES.items():
      through = evaluate(ready, batches(), mesh, functools.partial(decode.cached_sums, cache=form))
      empty = jax.eval_shape(functools.partial(model.init_cache, 1, SLOTS, form))
      rows.append({'cache': name, 'bits_per_byte': through['bits_per_byte'], 'bytes_a_token': num_bytes(empty) / SLOTS})
  origin = ledger.read(Path(workdir) / 'ledger.json')[-1].origin
  return {'date': collecting.today(), 'hardware': origin.hardware, 'versions': origin.versions,
          'corpus': origin.corpus_hash, 'steps': train.steps, 'seed': origin.seed, 'bytes': found['bytes'],
          'without': found['bits_per_byte'], 'rows': rows}


def table(results: dict) -> str:
  """A line for each cache."""
  lines = [['none: rows at once, documents apart', f'{results["without"]:.4f}', ''],
           *([row['cache'], f'{row["bits_per_byte"]:.4f}', f'{row["bytes_a_token"]:.0f}'] for row in results['rows'])]
  return collecting.markdown(['cache', 'bits per byte', 'bytes a token'], lines)


if __name__ == '__main__':
  results, here = collect(sys.argv[1]), Path(__file__).parent
  collecting.write(results, here)
  collecting.write_table(table(results), here)
