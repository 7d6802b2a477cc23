"""Collects the results of this experiment's runs in results.json, and writes them into the table of the README:

  python -m experiments.shapes.collect runs/shapes
"""
import statistics
import sys
from pathlib import Path

from efficient_lm.runs.ledger import quantity
from experiments import collecting

# Name of a run -> what the table says it is; in the table's order.
NAMES = {
  'dense': 'dense', 'width': '3/4 of width and hidden units, recovered', 'width_scratch': 'that shape from scratch',
  'depth': '3/4 of the layers, recovered', 'depth_scratch': 'that shape from scratch',
  'mixture': 'mixture of experts', 'experts_75': '3/4 of the experts, recovered',
  'experts_50': 'half of the experts, recovered',
  'experts_50_scratch': 'that shape from scratch'}


def collect(folder) -> dict:
  """Every run below `folder`, named NAME-SEED, as one row; what all of them share, once."""
  runs, rows = collecting.finished(folder), []
  for run in runs:
    by_stage = {row.stage.partition(' ')[2]: row for row in run.rows}
    row, bits = by_stage['train'], {name: one.quality.bits_per_byte for name, one in by_stage.items()}
    rows.append({
      'name': run.name.rpartition('-')[0], 'seed': row.origin.seed, 'bits_per_byte': bits['train'],
      'taken_away': bits.get('shrink'), 'skipping': bits.get('skipexperts'), 'parameters': row.size.parameters,
      'flops_per_token': row.size.flops_per_token, 'tokens': _tokens(run.config)})
  return collecting.in_common(runs) | {'rows': rows}


def _tokens(config: dict) -> int:
  """Of all trainings that a config names."""
  trainings = [config['train'], *(stage['training'] for stage in config.get('stages', ()) if 'training' in stage)]
  return sum(one['steps'] * one['batch_size'] * one['sequence_length'] for one in trainings)


def table(results: dict) -> str:
  """A line for each name: its size, bits per byte before any recovery (mean of seeds), and after it, of every seed and in
  the mean."""
  lines = []
  for name, what in NAMES.items():
    rows = [row for row in results['rows'] if row['name'] == name]
    found = [row['bits_per_byte'] for row in rows]
    before = f'{statistics.mean(row["taken_away"] for row in rows):.3f}' if rows[0]['taken_away'] else ''
    lines.append([what, quantity(rows[0]['parameters']), quantity(rows[0]['flops_per_token']), quantity(rows[0]['tokens']),
                  before, ', '.join(f'{value:.4f}' for value in found), f'{statistics.mean(found):.4f}'])
  return collecting.markdown(
    ['model', 'parameters', 'FLOPs a token', 'tokens', 'before', 'bits per byte, by seed', 'mean'], lines)


if __name__ == '__main__':
  found, here = collect(sys.argv[1]), Path(__file__).parent
  collecting.write(found, here)
  collecting.write_table(table(found), here)
