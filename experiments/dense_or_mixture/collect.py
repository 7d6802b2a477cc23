"""Collects the results of this experiment's runs in results.json, and prints the table of the README:

  python -m experiments.dense_or_mixture.collect runs/dense_or_mixture
"""
import statistics
import sys
from pathlib import Path

from efficient_lm.runs.ledger import quantity
from experiments import collecting

NAMES = {'baseline': 'dense', 'moe': 'mixture'}


def collect(folder) -> dict:
  """Every run below `folder`, named MODEL-SEED, as one row; what all of them share, once."""
  runs, rows = collecting.finished(folder), []
  for run in runs:
    row, train = run.rows[-1], run.config['train']
    steps, bits = run.curve('eval/bits_per_byte')
    rows.append({
      'model': run.name.rpartition('-')[0], 'seed': row.origin.seed, 'bits_per_byte': row.quality.bits_per_byte,
      'parameters': row.size.parameters, 'active_parameters': row.size.active_parameters,
      'flops_per_token': row.size.flops_per_token, 'bytes_in_memory': row.size.bytes_in_memory,
      'tokens': train['steps'] * train['batch_size'] * train['sequence_length'],
      'curve': [list(point) for point in zip(steps.tolist(), bits.tolist())]})
  return collecting.in_common(runs) | {'rows': rows}


def table(results: dict) -> str:
  """A line for each model: its size, and the bits per byte of every seed and of their mean."""
  seeds, lines = sorted({row['seed'] for row in results['rows']}), []
  for model, name in NAMES.items():
    rows = {row['seed']: row for row in results['rows'] if row['model'] == model}
    size, found = next(iter(rows.values())), [rows[seed]['bits_per_byte'] for seed in seeds]
    lines.append([name, *(quantity(size[key]) for key in ('parameters', 'active_parameters', 'flops_per_token')),
                  *(f'{bits:.4f}' for bits in (*found, statistics.mean(found)))])
  return collecting.markdown(['model', 'parameters', 'active', 'FLOPs a token', *(f'seed {seed}' for seed in seeds), 'mean'],
                             lines)


if __name__ == '__main__':
  results = collect(sys.argv[1])
  collecting.write(results, Path(__file__).parent)
  print(table(results))
