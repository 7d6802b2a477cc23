"""Gathers what the runs of this experiment came to in results.json, and prints the table:

  python experiments/quantization/collect.py runs/quantization
"""
import json
import pathlib
import statistics
import sys

from efficient_lm.runs import ledger


def collect(folder: pathlib.Path) -> dict:
  """Every run below `folder`, named METHOD-BITS-SEED or METHOD-SEED, as one row; what all of them share, once."""
  rows = []
  for run in sorted(path for path in folder.iterdir() if (path / 'ledger.json').is_file()):
    method, *bits, seed = run.name.split('-')
    first, *_, last = ledger.read(run / 'ledger.json') * 2   # what a stage began with, and what it made; or the same
    rows.append({
      'method': method, 'bits': bits[0] if bits else '32', 'seed': int(seed), 'bits_per_byte': last.quality.bits_per_byte,
      'bytes_on_disk': last.size.bytes_on_disk, 'float_bytes_on_disk': first.size.bytes_on_disk,
      'bytes_in_memory': last.size.bytes_in_memory, 'notes': last.notes})
  origin = last.origin
  return {'hardware': origin.hardware, 'versions': origin.versions, 'corpus': origin.corpus_hash, 'rows': rows}


def table(results: dict) -> str:
  """A line for each method and width: every seed, their mean, and bytes."""
  lines = ['| method | bits | bits per byte, by seed | mean | bytes on disk | of the float model\'s |',
           '| --- | --- | --- | --- | --- | --- |']
  kinds = {(row['method'], row['bits']) for row in results['rows']}
  for method, bits in sorted(kinds, key=lambda kind: (-float(kind[1]), kind[0])):
    rows = [row for row in results['rows'] if (row['method'], row['bits']) == (method, bits)]
    found = [row['bits_per_byte'] for row in sorted(rows, key=lambda row: row['seed'])]
    size, share = rows[0]['bytes_on_disk'], rows[0]['bytes_on_disk'] / rows[0]['float_bytes_on_disk']
    lines.append(f'| {method} | {bits} | {", ".join(f"{value:.4f}" for value in found)} | {statistics.mean(found):.4f} '
                 f'| {ledger.quantity(size, "B", 1024)} | {share:.3f} |')
  return '\n'.join(lines)


if __name__ == '__main__':
  results = collect(pathlib.Path(sys.argv[1]))
  text = json.dumps(results, indent=1)
  (pathlib.Path(__file__).parent / 'results.json').write_text(text + '\n', encoding='utf-8')
  print(table(results))
