"""Collects the results of this experiment's runs in results.json, writes them into the table of the README, and draws them:

  python -m experiments.pillars.collect runs/pillars
"""
import sys
from pathlib import Path

import matplotlib.figure

from efficient_lm.runs.ledger import quantity
from experiments import collecting

# Name of a run -> what the table says it is; in the table's order.
NAMES = {
  'baseline': 'dense baseline', 'moe': 'mixture of experts', 'low_precision': 'trained in int8', 'pruned': 'half pruned',
  'labels_alone': 'half the width and depth', 'distilled': 'the same, distilled', 'upcycled': 'upcycled',
  'stacked': 'mixture, distilled, half pruned, W8A8', 'recipe': 'half pruned, distilled, QAT in 4 bits'}
SIZES = {'parameters': '', 'nonzero_parameters': '', 'active_parameters': '', 'bytes_in_memory': 'B', 'bytes_on_disk': 'B',
         'flops_per_token': ''}
# Of points in the picture, where the name of the run alone says too little; and where labels stand, if not on the right.
LABELS = {'baseline': 'dense', 'moe': 'mixture of experts', 'low_precision': 'trained in int8', 'pruned': 'half pruned',
          'labels_alone': 'small', 'distilled': 'small, distilled', 'stacked': 'mixture, distilled,\nhalf pruned, W8A8',
          'recipe': 'half pruned, distilled,\n4-bit QAT'}
PLACES = {'baseline': (-6, 3, 'right'), 'low_precision': (6, 3, 'left'), 'stacked': (-2, -27, 'left'),
          'recipe': (-4, 8, 'left')}
HEADINGS = ('parameters', 'not zero', 'active', 'in memory', 'on disk', 'FLOPs a token')


def collect(folder) -> dict:
  """The last row of every run below `folder`, named NAME-SEED; what all of them share, once."""
  runs, rows = collecting.finished(folder), []
  for run in runs:
    row = run.rows[-1]
    rows.append({'name': run.name.rpartition('-')[0], 'seed': row.origin.seed, 'bits_per_byte': row.quality.bits_per_byte,
                 'steps': max(entry['step'] for entry in run.metrics),
                 **{size: getattr(row.size, size) for size in SIZES}, 'notes': row.notes})
  return collecting.in_common(runs) | {'rows': rows}


def table(results: dict) -> str:
  """A line for each run: the bits per byte of every seed, and the sizes of the first."""
  lines = []
  for name, what in NAMES.items():
    rows = [row for row in results['rows'] if row['name'] == name]
    sizes = [quantity(rows[0][size], unit, 1024 if unit else 1000) for size, unit in SIZES.items()]
    lines.append([what, str(rows[0]['steps']), ', '.join(f'{row["bits_per_byte"]:.4f}' for row in rows), *sizes])
  return collecting.markdown(['run', 'steps', 'bits per byte, by seed', *HEADINGS], lines)


def draw(results: dict, file):
  """Held-out bits per byte against the bytes of each model in memory, one point a run: better is below, smaller is left."""
  figure = matplotlib.figure.Figure(figsize=(8, 4.2))
  plot = figure.subplots()
  for row in sorted(results['rows'], key=lambda row: row['name'] == 'baseline'):   # above those that lie on it
    name, place = row['name'], (row['bytes_in_memory'] / 2 ** 20, row['bits_per_byte'])
    *offset, side = PLACES.get(name, (7, -3, 'left'))
    plot.plot(*place, 'o', color='tab:red' if name == 'baseline' else 'tab:blue')
    plot.annotate(LABELS.get(name, name), place, xytext=offset, textcoords='offset points', ha=side, fontsize=9)
  plot.set(xlabel='MiB in memory', ylabel='bits per byte, held-out text', xscale='log')
  plot.set_xticks([0.5, 1, 2, 4, 8, 16], ['0.5', '1', '2', '4', '8', '16'])
  plot.minorticks_off()
  plot.margins(x=0.25, y=0.08)
  plot.spines[['top', 'right']].set_visible(False)
  figure.savefig(file, dpi=150, bbox_inches='tight')


if __name__ == '__main__':
  results, here = collect(sys.argv[1]), Path(__file__).parent
  collecting.write(results, here)
  collecting.write_table(table(results), here)
  draw(results, here / 'pillars.png')
