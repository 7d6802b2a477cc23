#!/usr/bin/env bash
# What run.sh starts on a worker: trains, hands a signal on, and leaves the exit code in train.exit.
# usage: tpu_scripts/train.sh --config=… --workdir=runs/NAME
set -uo pipefail
.venv/bin/python -m efficient_lm.main "$@" &
program=$!
trap 'kill -TERM "$program"' TERM
# A signal ends one wait, not the program: it saves first.
while wait "$program"; code=$?; kill -0 "$program" 2> /dev/null; do :; done
echo "$code" > train.exit
exit "$code"
