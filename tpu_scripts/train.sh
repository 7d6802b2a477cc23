#!/usr/bin/env bash
# What run.sh starts on a worker: trains, and copies the run to BUCKET, if there is one, while it goes and at its end. On an
# empty disk, as after a slice was taken away, it begins with what BUCKET has. Leaves the exit code in train.exit.
# usage: BUCKET=gs://… WORKDIR=runs/NAME tpu_scripts/train.sh --config=… --workdir=runs/NAME
set -uo pipefail
: "${BUCKET:=}" "${COPY_EVERY:=300}"
copy=''
# Of several workers, which see one folder, the first one copies.
if [ -n "$BUCKET" ] && [ "${TPU_WORKER_ID:-$(tpu_scripts/worker.sh)}" = 0 ]; then copy="${BUCKET%/}/$(basename "$WORKDIR")"; fi

up() {
  # A checkpoint is named last, by a rename: what is still being written is left out.
  [ -z "$copy" ] || [ ! -d "$WORKDIR" ] || gcloud storage rsync --recursive --exclude '.*orbax-checkpoint-tmp.*|.*\.partial$|(.*/)?lock$' "$WORKDIR" "$copy"
}

if [ -n "$copy" ] && [ ! -f "$WORKDIR/config.json" ] && gcloud storage ls "$copy/" > /dev/null 2>&1; then
  mkdir -p "$WORKDIR"
  gcloud storage rsync --recursive "$copy" "$WORKDIR" || { echo 2 > train.exit; exit 2; }
fi
.venv/bin/python -m efficient_lm.main "$@" &
program=$!
trap 'kill -TERM "$program"' TERM
( while sleep "$COPY_EVERY"; do up; done ) &
copying=$!
# A signal ends one wait, not the program: it saves first.
while wait "$program"; code=$?; kill -0 "$program" 2> /dev/null; do :; done
kill "$copying" 2> /dev/null
up
echo "$code" > train.exit
exit "$code"
