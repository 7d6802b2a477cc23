#!/usr/bin/env bash
# Every run of the table, from the root of the project; one that is done is passed over, one that was stopped goes on.
set -euo pipefail
folder=runs/shapes

for seed in ${SEEDS:-0 1 2}; do
  run() {   # NAME CONFIG WORDS…
    python -m efficient_lm.main --config="configs/$2" --workdir="$folder/$1-$seed" --config.seed="$seed" "${@:3}"
  }
  run dense baseline.py
  run mixture moe.py
  for kind in width depth; do
    run "$kind" pruned.py:"$kind" --config.start.path="$folder/dense-$seed"
    run "${kind}_scratch" pruned.py:"${kind}_scratch"
  done
  run experts_75 pruned.py:experts --config.start.path="$folder/mixture-$seed" --config.stages[0].to.experts=0.75
  run experts_50 pruned.py:experts --config.start.path="$folder/mixture-$seed"
  run experts_50_scratch pruned.py:experts_scratch
done
