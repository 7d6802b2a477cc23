#!/usr/bin/env bash
# Gives the slice back, and with it all that lies on its disks.
# usage: tpu_scripts/delete.sh [--dry-run]
# shellcheck source=tpu_scripts/settings.sh
. "$(dirname "$0")/settings.sh"
cloud compute tpus queued-resources delete "$TPU_NAME" --zone "$ZONE" --force --quiet "$@"
