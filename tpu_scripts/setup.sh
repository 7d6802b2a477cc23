#!/usr/bin/env bash
# Copies this checkout to every worker and installs it there with JAX for TPU; mounts the share, where there is one.
# usage: [SHARED=SERVER:/PATH] tpu_scripts/setup.sh [--dry-run]
# shellcheck source=tpu_scripts/settings.sh
. "$(dirname "$0")/settings.sh"
top=$(git -C "$(dirname "$0")" rev-parse --show-toplevel)
archive=$(mktemp)
trap 'rm -f "$archive"' EXIT
git -C "$top" archive --format tar.gz -o "$archive" HEAD
cloud compute tpus tpu-vm scp "$archive" "$TPU_NAME:efficient_lm.tar.gz" --zone "$ZONE" --worker=all
on all 'mkdir -p efficient_lm && tar xzf efficient_lm.tar.gz -C efficient_lm && cd efficient_lm &&
  python3 -m venv .venv && .venv/bin/pip install -q -e ".[tpu,gcs]"'
if [ -n "$SHARED" ]; then
  on all "sudo apt-get install -qy nfs-common && mkdir -p efficient_lm/runs &&
  { mountpoint -q efficient_lm/runs || sudo mount -t nfs $(printf '%q' "$SHARED") efficient_lm/runs; }"
fi
