"""What a run has left, without all that depends on the machine and on interruptions: for comparisons bit for bit."""
import dataclasses
import json

from efficient_lm.runs import ledger, record

TIMINGS = ('steps_per_second', 'tokens_per_second', 'crc32')   # and the checksum of all


def left(workdir) -> dict:
  """Rows, keys, models, tables of weights and structures of all stages. Of rows not what was measured of the machine, nor
  the bytes on disk: Orbax packs arrays into files as its threads come to them."""
  known = record.read(workdir)
  rows = [dataclasses.asdict(dataclasses.replace(row, speed=ledger.Speed(), effort=ledger.Effort(),
                                                 size=dataclasses.replace(row.size, bytes_on_disk=None)))
          for row in ledger.read(workdir / 'ledger.json')]
  found = {'rows': rows, 'keys': [planned.key for planned in known.plan]}
  for planned in known.plan:
    manifest = json.loads(next(record.stage_folder(workdir, planned).glob('*/manifest/metadata')).read_text())
    found[planned.name] = manifest['leaves'], manifest['record']['weights'], manifest['record']['structure']
  return found


def metrics(workdir) -> list[dict]:
  """The rows of metrics.jsonl."""
  return [{name: value for name, value in json.loads(line).items() if name not in TIMINGS}
          for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
