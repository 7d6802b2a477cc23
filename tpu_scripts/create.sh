#!/usr/bin/env bash
# Asks for a TPU slice and waits until it is there (queued resources: a busy zone answers when it can).
. "$(dirname "$0")/settings.sh"
gcloud compute tpus queued-resources create "$TPU_NAME" --node-id "$TPU_NAME" --zone "$ZONE" \
  --accelerator-type "$ACCELERATOR" --runtime-version "$RUNTIME" "$@"
until gcloud compute tpus queued-resources describe "$TPU_NAME" --zone "$ZONE" --format 'value(state.state)' | tee /dev/stderr | grep -q ACTIVE
do sleep 20; done
