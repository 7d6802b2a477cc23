#!/usr/bin/env bash
# Follows the log of the first worker, or of another: tpu_scripts/tail.sh 3
# shellcheck source=tpu_scripts/settings.sh
. "$(dirname "$0")/settings.sh"
on "${1:-0}" 'tail -n 50 -f efficient_lm/train.log'
