"""Collects the results of this experiment's runs in results.json, and prints the table of the README:

  python -m experiments.quantization.collect runs/quantization
"""
import statistics
import sys
from pathlib import Path

from efficient_lm.runs.ledger import quantity
from experiments import collecting

# In the table's order; the last three have been trained for 200 steps more. ('whole', of one size only, is in the text.)
NAMES = {'float': 'float', 'rtn': 'RTN', 'awq': 'AWQ', 'gptq': 'GPTQ',
         'more': 'float, 200 more steps', 'gptq_more': 'GPTQ, 200 more steps', 'qat': 'QAT, 200 more steps'}
LONGER = ('more', 'gptq_more', 'qat')


def collect(folder) -> dict:
  """Every run below `folder`, named METHOD-BITS-SEED or METHOD-SEED, as one row; what all of them share, once."""
  runs, rows = collecting.finished(folder), []
  for run in runs:
    method, *bits, seed = run.name.split('-')
    first, last = run.rows[0], run.rows[-1]   # what a stage began with, and what it made; or the same
    rows.append({
      'method': method, 'bits': bits[0] if bits else '32', 'seed': int(seed), 'bits_per_byte': last.quality.bits_per_byte,
      'bytes_on_disk': last.size.bytes_on_disk, 'float_bytes_on_disk': first.size.bytes_on_disk,
      'bytes_in_memory': last.size.bytes_in_memory, 'notes': last.notes})
  return collecting.in_common(runs) | {'rows': rows}


def table(results: dict) -> str:
  """A line for each method and number of bits: the bits per byte of every seed and of their mean, and seed 0's bytes."""
  seeds, lines = sorted({row['seed'] for row in results['rows']}), []
  kinds = {(row['method'], row['bits']) for row in results['rows'] if row['method'] in NAMES}
  order = lambda kind: (kind[0] in LONGER, -float(kind[1]), list(NAMES).index(kind[0]))
  for method, bits in sorted(kinds, key=order):
    rows = {row['seed']: row for row in results['rows'] if (row['method'], row['bits']) == (method, bits)}
    found = [rows[seed]['bits_per_byte'] for seed in seeds]
    lines.append([NAMES[method], bits, *(f'{value:.4f}' for value in (*found, statistics.mean(found))),
                  quantity(rows[seeds[0]]['bytes_on_disk'], 'B', 1024)])
  return collecting.markdown(['method', 'bits', *(f'seed {seed}' for seed in seeds), 'mean', 'bytes on disk'], lines)


if __name__ == '__main__':
  results = collect(sys.argv[1])
  collecting.write(results, Path(__file__).parent)
  print(table(results))
