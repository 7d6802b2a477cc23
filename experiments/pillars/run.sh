#!/usr/bin/env bash
# Every run of the table, from the root of the project; one that is done is passed over, one that was stopped goes on. Words
# are passed to every run: run.sh --config.train.steps=10. SEEDS='0 1 2' for more seeds than one.
set -euo pipefail
folder=runs/pillars

run() {   # NAME CONFIG overrides
  python -m efficient_lm.main --config=configs/"$2".py --workdir="$folder/$1-$seed" --config.seed="$seed" "${@:3}"
}

for seed in ${SEEDS:-0}; do
  baseline=$folder/baseline-$seed
  teacher="--config.techniques[0].teacher.path=$baseline"
  run baseline baseline "$@"
  run moe moe "$@"
  run low_precision low_precision "$@"
  run pruned pruned "$@"
  run labels_alone distilled "$teacher" '--config.techniques[0].weight=0' "$@"
  run distilled distilled "$teacher" "$@"
  run upcycled upcycled --config.start.path="$baseline" "$@"
  run stacked stacked "$teacher" "$@"
  run recipe recipe "--config.stages[1].techniques[0].teacher.path=$baseline" "$@"
done
