"""Dense baseline: the row that every technique is compared with.

  make baseline
  python -m efficient_lm.main --config=configs/baseline.py --workdir=runs/baseline

tiny (default): minutes on a CPU, 1.670 bits per byte on held-out Python source (one seed, experiments/pillars). With 600
steps 1.59 (mean of three seeds, experiments/dense_or_mixture).
gpt2_124m: for one H100 or a v5e-8, not run yet. llama3_8b: to plan with and for a pod.
"""
from efficient_lm.config import Experiment, presets


def get_config(variant: str = 'tiny') -> Experiment:
  return presets.dense(variant)
