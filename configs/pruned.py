"""Pruning while training: half of every matrix to exact zeros by two thirds of the steps. What does it cost in quality?

  make pruned
  python -m efficient_lm.main --config=configs/pruned.py --workdir=runs/pruned
  python -m efficient_lm.main --config=configs/pruned.py --config.techniques[0].sparsity=0.8

tiny (default): minutes on a CPU, 1.758 bits per byte beside 1.670 of the dense baseline (one seed, experiments/pillars).
gpt2_124m: for one H100 or a v5e-8, not run yet.
"""
import dataclasses

from efficient_lm.config import Experiment, presets
from efficient_lm.techniques import Prune


def get_config(variant: str = 'tiny') -> Experiment:
  return dataclasses.replace(presets.dense(variant), techniques=(Prune(sparsity=0.5),))
