#!/usr/bin/env bash
# Copies this checkout to every worker and installs it there with JAX for TPU.
. "$(dirname "$0")/settings.sh"
top=$(git rev-parse --show-toplevel)
archive=$(mktemp)
git -C "$top" archive --format tar.gz -o "$archive" HEAD
gcloud compute tpus tpu-vm scp "$archive" "$TPU_NAME:efficient_lm.tar.gz" --zone "$ZONE" --worker=all
rm "$archive"
on_all_workers 'mkdir -p efficient_lm && tar xzf efficient_lm.tar.gz -C efficient_lm && cd efficient_lm &&
  python3 -m venv .venv && .venv/bin/pip install -q -e ".[tpu]"'
