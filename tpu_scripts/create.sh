#!/usr/bin/env bash
# Asks for a TPU slice and waits until it is there (queued resources: a busy zone answers when it can).
# usage: [TPU_NAME=… ZONE=… ACCELERATOR=v5litepod-16 RUNTIME=… SPOT=1] tpu_scripts/create.sh [--dry-run] [more words for gcloud]
# shellcheck source=tpu_scripts/settings.sh
. "$(dirname "$0")/settings.sh"
cloud compute tpus queued-resources create "$TPU_NAME" --node-id "$TPU_NAME" --zone "$ZONE" \
  --accelerator-type "$ACCELERATOR" --runtime-version "$RUNTIME" ${SPOT:+--spot} "$@"
[ -z "$dry_run" ] || exit 0
until now=$(state); [ "$now" = ACTIVE ]; do
  echo "$TPU_NAME: $now" >&2
  case $now in
    NONE|FAILED|SUSPENDED|SUSPENDING|DELETING) refuse "$TPU_NAME is $now and will not come: tpu_scripts/delete.sh, then try again or elsewhere" ;;
  esac
  sleep "$EVERY"
done
