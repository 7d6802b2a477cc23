"""Mixture of experts: what do eight times the experts buy at the same active parameters and FLOPs a token?

  make moe
  python -m efficient_lm.main --config=configs/moe.py --workdir=runs/moe
  python -m efficient_lm.main --config=configs/moe.py:gpt2_124m --config.mesh.expert=8

tiny (default): 4 min 46 s on 2 CPU cores, 1.60 bits per byte on held-out Python source. With 600 steps 1.53, beside 1.59 of
configs/baseline.py (means of three seeds). gpt2_124m: for one H100 or a v5e-8, not run yet. Published shapes: to plan with.
"""
from efficient_lm.config import Experiment, presets


def get_config(variant: str = 'tiny') -> Experiment:
  return presets.mixture(variant)
