#!/usr/bin/env bash
# Every run of the table, from the root of the project; one that is done is passed over, one that was stopped goes on. Words
# are passed to the trainings: run.sh --config.train.steps=10.
set -euo pipefail
folder=runs/sparsity

for seed in ${SEEDS:-0 1 2}; do
  baseline=$folder/dense-$seed
  python -m efficient_lm.main --config=configs/baseline.py --workdir="$baseline" --config.seed="$seed" "$@"
  for name in magnitude_50 wanda_50_matrix magnitude_50_output wanda_50 sparsegpt_50 magnitude_2_4 wanda_2_4 sparsegpt_2_4 \
    int4 joint one_after_the_other; do
    python -m efficient_lm.main --config=experiments/sparsity/config.py:"$name" --workdir="$folder/$name-$seed" \
      --config.start.path="$baseline" --config.seed="$seed"
  done
done
