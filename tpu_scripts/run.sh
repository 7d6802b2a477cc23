#!/usr/bin/env bash
# Trains on all workers, detached; the same command again resumes. Workers of several hosts meet by themselves, and need a
# workdir that all of them see: under runs/, where setup.sh has mounted SHARED. Of an address the run is kept under runs/, too.
# usage: tpu_scripts/run.sh --config=configs/moe.py:olmoe_1b_7b --workdir=runs/olmoe|gs://BUCKET/FOLDER [--dry-run] [words]
# shellcheck source=tpu_scripts/settings.sh
. "$(dirname "$0")/settings.sh"
[ -n "$workdir" ] || refuse 'write --workdir=runs/NAME: it is what the same command resumes'
hosts=$(num_hosts) || refuse "$TPU_NAME in $ZONE does not answer: tpu_scripts/create.sh makes it"
if [ "$hosts" -gt 1 ]; then
  [ -n "$SHARED" ] || refuse "$TPU_NAME has $hosts hosts, which need one folder for the run: SHARED=SERVER:/PATH of an NFS share, in setup.sh, too"
  case $workdir in
    runs/?* | *://*) ;;
    *) refuse "--workdir=$workdir: write --workdir=runs/NAME: the share is mounted as runs" ;;
  esac
fi
line="nohup tpu_scripts/train.sh $(printf '%q ' "$@")"
on all "cd efficient_lm && rm -f train.exit && { $line> train.log 2>&1 < /dev/null & echo \$! > train.pid; }"
