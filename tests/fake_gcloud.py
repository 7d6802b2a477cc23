#!/usr/bin/env python3
"""Stands in for gcloud, beside a folder `cloud` that is a slice: it refuses words that gcloud does not have, notes each
call, and performs what is sent to a worker in a folder of this machine.

  calls.jsonl      each call      states     what queued-resources describe says, a line a call; the last one stays
  hosts/<n>/       the home of worker n
"""
import json
import os
import pathlib
import shutil
import subprocess
import sys

CLOUD = pathlib.Path(os.environ['FAKE_CLOUD'])
# Of the reference of gcloud: number of names, flags that are needed, others; a flag that ends with = takes a value.
KNOWN = {
  'compute tpus queued-resources create': (1, {'--node-id=', '--zone=', '--accelerator-type=', '--runtime-version='},
                                           {'--spot', '--network=', '--project='}),
  'compute tpus queued-resources delete': (1, {'--zone='}, {'--force', '--quiet', '--async', '--project='}),
  'compute tpus queued-resources describe': (1, {'--zone='}, {'--format=', '--project='}),
  'compute tpus tpu-vm describe': (1, {'--zone='}, {'--format=', '--project='}),
  'compute tpus tpu-vm ssh': (1, {'--zone=', '--worker=', '--command='}, {'--project='}),
  'compute tpus tpu-vm scp': (2, {'--zone=', '--worker='}, {'--recurse', '--project='}),
}


def parsed(words):
  """The command, its names and its flags. Leaves with 2 for what gcloud would refuse."""
  command = next((known for known in KNOWN if words[:known.count(' ') + 1] == known.split()), None)
  if not command: sys.exit(f'gcloud: no command {words}')
  count, needed, others = KNOWN[command]
  rest, names, flags = list(words[command.count(' ') + 1:]), [], {}
  while rest:
    name, equals, value = rest.pop(0).partition('=')
    if not name.startswith('--'): names.append(name + equals + value)
    elif name in others: flags[name] = True
    elif f'{name}=' in needed | others: flags[name] = value if equals else rest.pop(0)
    else: sys.exit(f'gcloud {command}: no flag {name}')
  missing = [flag for flag in needed if flag.rstrip('=') not in flags]
  if missing or len(names) != count: sys.exit(f'gcloud {command}: {missing} missing, or names {names}')
  return command, names, flags


def homes(worker: str) -> list:
  """Of one worker, or of all."""
  there = sorted((CLOUD / 'hosts').iterdir())
  return there if worker == 'all' else [there[int(worker)]]


def main():
  command, names, flags = parsed(sys.argv[1:])
  with (CLOUD / 'calls.jsonl').open('a') as file: file.write(json.dumps([command, names, flags]) + '\n')
  if command == 'compute tpus queued-resources describe':
    states = (CLOUD / 'states').read_text().split('\n')
    if len(states) > 1: (CLOUD / 'states').write_text('\n'.join(states[1:]))
    if states[0] == 'NONE': sys.exit('gcloud: NOT_FOUND')
    print(states[0])
  elif command == 'compute tpus tpu-vm describe': print(';'.join(f'10.0.0.{home.name}' for home in homes('all')))
  elif command == 'compute tpus tpu-vm ssh':
    codes = [subprocess.run(['bash', '-c', flags['--command']], cwd=home, check=False,
                            env={**os.environ, 'HOME': str(home), 'TPU_WORKER_ID': home.name}).returncode
             for home in homes(flags['--worker'])]
    sys.exit(max(codes))
  elif command == 'compute tpus tpu-vm scp':
    for home in homes(flags['--worker']): shutil.copy(names[0], home / names[1].partition(':')[2])


main()
