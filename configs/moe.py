"""Mixture of experts: what do eight times the experts buy at the same active parameters and FLOPs a token?

  make moe
  python -m efficient_lm.main --config=configs/moe.py --workdir=runs/moe
  python -m efficient_lm.main --config=configs/moe.py:gpt2_124m --config.mesh.expert=8

tiny (default): minutes on a CPU, 1.604 bits per byte beside 1.670 of configs/baseline.py (one seed, experiments/pillars).
With 600 steps 1.53 beside 1.59 (means of three seeds, experiments/dense_or_mixture).
gpt2_124m: for one H100 or a v5e-8, not run yet. Published shapes: to plan with.
"""
from efficient_lm.config import Experiment, presets


def get_config(variant: str = 'tiny') -> Experiment:
  return presets.mixture(variant)
