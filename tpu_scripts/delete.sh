#!/usr/bin/env bash
# Gives the slice back, and with it all that lies on its disks.
. "$(dirname "$0")/settings.sh"
gcloud compute tpus queued-resources delete "$TPU_NAME" --zone "$ZONE" --force "$@"
