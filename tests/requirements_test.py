"""What is installed is pinned, and every file of it has a hash."""
import pathlib
import re

ROOT = pathlib.Path(__file__).parent.parent


def pinned(lines) -> dict[str, str]:
  """{name: version}, names as they are compared."""
  found = (re.match(r'([\w.-]+)==([\w.+!-]+)', line) for line in lines)
  return {re.sub(r'[-_.]+', '-', each[1]).lower(): each[2] for each in found if each}


def test_the_lock_has_every_requirement_and_hashes_for_each():
  wanted = pinned((ROOT / 'requirements.txt').read_text().splitlines())
  entries = re.split(r'\n(?=\S)', (ROOT / 'requirements.lock').read_text().strip())
  assert wanted.items() <= pinned(entries).items(), 'make lock'
  for entry in entries:
    first, *rest = entry.replace('\\\n', '\n').splitlines()
    assert '==' in first and rest and all(re.fullmatch(r'--hash=sha256:[0-9a-f]{64}', line.strip()) for line in rest), first
  assert '://' not in (ROOT / 'requirements.lock').read_text()
