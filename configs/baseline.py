"""Dense baseline: the row that every technique is compared with.

  make baseline
  python -m efficient_lm.main --config=configs/baseline.py --workdir=runs/baseline

tiny (default): minutes on a CPU. With 600 steps 1.59 bits per byte on held-out Python source (mean of three seeds), in 5 to
7 minutes on one core.
gpt2_124m: for one H100 or a v5e-8, not run yet. llama3_8b: to plan with and for a pod.
"""
from efficient_lm.config import Experiment, presets


def get_config(variant: str = 'tiny') -> Experiment:
  return presets.dense(variant)
