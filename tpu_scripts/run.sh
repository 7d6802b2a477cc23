#!/usr/bin/env bash
# Trains on all workers, detached; the same command again resumes. The workdir must be one that all workers see (gs://…).
# usage: tpu_scripts/run.sh --config=configs/moe.py:olmoe_1b_7b --workdir=gs://BUCKET/olmoe --config.mesh.expert=8
. "$(dirname "$0")/settings.sh"
words=$(printf '%q ' "$@")
on_all_workers "cd efficient_lm && nohup .venv/bin/python -m efficient_lm.main $words > train.log 2>&1 < /dev/null &"
