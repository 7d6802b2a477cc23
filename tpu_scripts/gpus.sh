#!/usr/bin/env bash
# Trains on machines with GPUs that ssh reaches, a process each; all of them have this checkout in one place, with .venv and the
# extra gpu, and the workdir is one folder for all. Waits for the end; Ctrl-C, or a SIGTERM, has all of them save and stop.
# usage: HOSTS="gpu-a gpu-b" tpu_scripts/gpus.sh --config=configs/moe.py --workdir=/mnt/shared/moe [--dry-run]
# Without HOSTS it trains here. The first host's name, which the others must be able to reach, is where they meet, at PORT.
set -uo pipefail
: "${HOSTS:=}" "${PORT:=8476}" "${CHECKOUT:=$(cd "$(dirname "$0")/.." && pwd)}"
dry_run=''
words=()
for word in "$@"; do
  if [ "$word" = --dry-run ]; then dry_run=1; else words+=("$word"); fi
done
[ "${#words[@]}" -gt 0 ] || { echo 'write --config=FILE.py and --workdir=FOLDER' >&2; exit 2; }
read -ra hosts <<< "$HOSTS"
line="cd $(printf '%q' "$CHECKOUT") && exec .venv/bin/python -m efficient_lm.main $(printf '%q ' "${words[@]}")"
if [ "${#hosts[@]}" -le 1 ]; then
  call=(${hosts[0]:+ssh "${hosts[0]}"})
  [ "${#call[@]}" -gt 0 ] || call=(bash -c)
  if [ -n "$dry_run" ]; then printf '%q ' "${call[@]}" "$line"; echo; exit 0; fi
  exec "${call[@]}" "$line"
fi

started=()
for i in "${!hosts[@]}"; do
  own="$line--coordinator=${hosts[0]}:$PORT --process_id=$i --num_processes=${#hosts[@]}"
  # -tt: the program gets a SIGHUP or SIGINT with the end of ssh.
  if [ -n "$dry_run" ]; then printf '%q ' ssh -tt "${hosts[$i]}" "$own"; echo; continue; fi
  ssh -tt "${hosts[$i]}" "$own" < /dev/null &
  started+=($!)
done
[ -z "$dry_run" ] || exit 0
# shellcheck disable=SC2029,SC2317,SC2329   # called by the trap; the name and the port are those known here
stop() { ssh "${hosts[0]}" "pkill -TERM -f '[e]fficient_lm.main.*--coordinator=${hosts[0]}:$PORT'"; }
trap stop TERM INT
code=0
for program in "${started[@]}"; do
  while wait "$program"; own=$?; kill -0 "$program" 2> /dev/null; do :; done
  if [ "$own" -gt "$code" ]; then code=$own; fi
done
exit "$code"
