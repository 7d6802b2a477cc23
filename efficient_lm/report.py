"""The report of one or more runs: a table in the terminal, `report.html` (one file, nothing loaded) and `report.png`.

  python -m efficient_lm.report runs/moe runs/dense --out=runs

Reads config.json, metrics.jsonl, ledger.json, samples/ and what stages have left, and makes do with those that are there.
"""
import argparse
import sys

from efficient_lm.errors import CheckpointError, ConfigError, WriteError


class Parser(argparse.ArgumentParser):
  """Says what is wrong in one line, as all commands do."""

  def error(self, message):
    self.exit(2, f'{message}: {" ".join(self.format_usage().split())}\n')


def main(arguments: list[str] | None = None) -> int:
  """Returns the exit code."""
  parser = Parser(
    prog='python -m efficient_lm.report',
    description='Shows the ledger of one or more runs and writes report.html and report.png.')
  parser.add_argument('run', nargs='+', help='workdir of a run')
  parser.add_argument('--out', help='folder for the report (default: the run\'s own; for several runs, this folder)')
  options = parser.parse_args(arguments)
  import rich.console

  from efficient_lm.runs import ledger, mirror, report_page, results, writing
  try:
    folders = [mirror.local('run', path) for path in options.run]
    found = results.load_all(folders)
  except (ConfigError, CheckpointError, WriteError) as error:
    print(error, file=sys.stderr)
    return error.exit_code
  rows = results.labelled(found)
  if rows: rich.console.Console().print(ledger.table(rows))
  out = options.out or (folders[0] if len(found) == 1 else '.')
  try:
    with writing.needed(out): print(report_page.write(found, out))
  except (ConfigError, WriteError) as error:
    print(error, file=sys.stderr)
    return error.exit_code
  return 0


if __name__ == '__main__': sys.exit(main())
