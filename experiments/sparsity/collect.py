"""Collects the results of this experiment's runs in results.json, and writes them into the table of the README:

  python -m experiments.sparsity.collect runs/sparsity
"""
import statistics
import sys
from pathlib import Path

from experiments import collecting

# Name of a run -> what the table says it is; in the table's order.
NAMES = {
  'dense': 'dense', 'magnitude_50': 'magnitude, 50 %, within a matrix', 'wanda_50_matrix': 'Wanda, 50 %, within a matrix',
  'magnitude_50_output': 'magnitude, 50 %, within an output', 'wanda_50': 'Wanda, 50 %, within an output',
  'sparsegpt_50': 'SparseGPT, 50 %', 'magnitude_2_4': 'magnitude, 2:4', 'wanda_2_4': 'Wanda, 2:4',
  'sparsegpt_2_4': 'SparseGPT, 2:4', 'int4': 'GPTQ, 4 bits',
  'joint': '50 % and 4 bits in one pass', 'one_after_the_other': 'SparseGPT, 50 %, then GPTQ, 4 bits'}


def collect(folder) -> dict:
  """The last row of every run below `folder`, named NAME-SEED; what all of them share, once."""
  runs, rows = collecting.finished(folder), []
  for run in runs:
    row = run.rows[-1]
    nonzero = row.size.nonzero_parameters or row.size.parameters
    rows.append({'name': run.name.rpartition('-')[0], 'seed': row.origin.seed, 'bits_per_byte': row.quality.bits_per_byte,
                 'nonzero': nonzero / row.size.parameters, 'notes': row.notes})
  return collecting.in_common(runs) | {'rows': rows}


def table(results: dict) -> str:
  """A line for each name: bits per byte of every seed, their mean, what they lie above dense, and what is not zero."""
  lines = []
  values = lambda name: [row['bits_per_byte'] for row in results['rows'] if row['name'] == name]
  dense = statistics.mean(values('dense'))
  for name, what in NAMES.items():
    found = values(name)
    nonzero = next(row['nonzero'] for row in results['rows'] if row['name'] == name)
    lines.append([what, ', '.join(f'{value:.4f}' for value in found), f'{statistics.mean(found):.4f}',
                  f'{statistics.mean(found) - dense:+.4f}', f'{nonzero:.1%}'])
  return collecting.markdown(['model', 'bits per byte, by seed', 'mean', 'above dense', 'not zero'], lines)


if __name__ == '__main__':
  found, here = collect(sys.argv[1]), Path(__file__).parent
  collecting.write(found, here)
  collecting.write_table(table(found), here)
