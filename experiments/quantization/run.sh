#!/usr/bin/env bash
# Every run of the table, from the root of the project; a run that is done already is passed over.
set -euo pipefail
seeds=${SEEDS:-0 1 2}
run() {
  python -m efficient_lm.main --config=experiments/quantization/config.py:"$1" --workdir=runs/quantization/"$1"
}
for seed in $seeds; do
  run float-"$seed"
  run more-"$seed"
  for bits in 8 4 3 2; do for method in rtn awq gptq; do run "$method-$bits-$seed"; done; done
  for bits in 3 2; do run "gptq_more-$bits-$seed"; done
  for bits in 4 3 2 1.58; do run "qat-$bits-$seed"; done
done
run whole-4-0
