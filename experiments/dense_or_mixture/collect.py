"""Gathers what the six runs of this experiment came to in results.json:

  python experiments/dense_or_mixture/collect.py runs/dense_or_mixture
"""
import json
import pathlib
import sys

from efficient_lm.runs import ledger, tracking


def collect(folder: pathlib.Path) -> dict:
  """Every run below `folder`, named model-seed, as one row; what all of them share, once."""
  rows = []
  for run in sorted(path for path in folder.iterdir() if (path / 'ledger.json').is_file()):
    row = ledger.read(run / 'ledger.json')[-1]
    curve = [(entry['step'], entry['eval/bits_per_byte']) for entry in tracking.read(run / 'metrics.jsonl')
             if 'eval/bits_per_byte' in entry]
    rows.append({
      'model': run.name.rpartition('-')[0], 'seed': row.origin.seed, 'bits_per_byte': row.quality.bits_per_byte,
      'parameters': row.size.parameters, 'active_parameters': row.size.active_parameters,
      'flops_per_token': row.size.flops_per_token, 'bytes_in_memory': row.size.bytes_in_memory,
      'tokens': row.effort.tokens, 'curve': curve})
  origin = row.origin
  return {'hardware': origin.hardware, 'versions': origin.versions, 'corpus': origin.corpus_hash,
          'yardsticks': row.quality.yardsticks, 'rows': rows}


if __name__ == '__main__':
  results = json.dumps(collect(pathlib.Path(sys.argv[1])), indent=1)
  (pathlib.Path(__file__).parent / 'results.json').write_text(results + '\n', encoding='utf-8')
