#!/usr/bin/env bash
# Trains to the end, however often the slice is taken away: makes it, sets it up, runs, looks after it, and begins again where it
# was. Leave it running on a machine of your own. What was done lies in a bucket or on SHARED: a new slice has empty disks.
# usage: SPOT=1 tpu_scripts/keep.sh --config=configs/moe.py --workdir=gs://BUCKET/FOLDER [--dry-run]
# shellcheck source=tpu_scripts/settings.sh
. "$(dirname "$0")/settings.sh"
export TPU_NAME ZONE ACCELERATOR RUNTIME SPOT SHARED EVERY
[[ -n $SHARED || $workdir = *://* ]] ||
  refuse "--workdir=$workdir: write --workdir=gs://BUCKET/FOLDER, or give SHARED=SERVER:/PATH: a new slice has empty disks"
here=$(dirname "$0")
if [ -n "$dry_run" ]; then
  "$here/create.sh" --dry-run
  "$here/setup.sh" --dry-run
  "$here/run.sh" --dry-run "$@"
  exit 0
fi
# What train.sh has left on the first worker: a code, or nothing while it goes on, or where the worker does not answer.
ended() {
  # shellcheck disable=SC2016   # the worker expands it
  on 0 'cd efficient_lm && { cat train.exit || kill -0 "$(cat train.pid)" || cat train.exit || echo gone; } 2> /dev/null' 2> /dev/null || true
}

begun=''
while :; do
  case $(state) in
    ACTIVE)
      if [ -z "$begun" ]; then "$here/setup.sh"; fi
      code=$([ -z "$begun" ] || ended)
      case $code in
        0) exit 0 ;;
        2|3|4) refuse "the run has ended with exit code $code: tpu_scripts/tail.sh says why" ;;
        7) "$here/delete.sh" ;;   # a device is faulty: another slice goes on
        '') if [ -z "$begun" ]; then "$here/run.sh" "$@"; fi ;;
        *) "$here/run.sh" "$@" ;;   # interrupted, or one of the workers had gone: all begin again
      esac
      begun=1 ;;
    NONE) "$here/create.sh" || true; begun='' ;;
    FAILED|SUSPENDED) "$here/delete.sh"; begun='' ;;
    *) begun='' ;;
  esac
  sleep "$EVERY"
done
