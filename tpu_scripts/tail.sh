#!/usr/bin/env bash
# Follows the log of the first worker.
. "$(dirname "$0")/settings.sh"
gcloud compute tpus tpu-vm ssh "$TPU_NAME" --zone "$ZONE" --worker=0 --command 'tail -n 50 -f efficient_lm/train.log'
