"""Upcycling: the trained dense baseline becomes a mixture of 8 experts and trains on. Is that better than from scratch?

  make baseline upcycled
  python -m efficient_lm.main --config=configs/upcycled.py --workdir=runs/upcycled

tiny (default): minutes on a CPU, 1.575 bits per byte after 250 steps on top of the baseline's 500 (1.670), at 1.7 times its
active parameters; the mixture of configs/moe.py reaches 1.604 in 500 (one seed, experiments/pillars).
gpt2_124m: for one H100 or a v5e-8, not run yet; it starts from runs/baseline-gpt2_124m.
"""
import dataclasses

from efficient_lm.config import Experiment, presets
from efficient_lm.runs import trained
from efficient_lm.techniques import Upcycle


def get_config(variant: str = 'tiny') -> Experiment:
  start, dense = trained(variant), presets.dense(variant)
  train = dataclasses.replace(dense.train, steps=dense.train.steps // 2)
  return dataclasses.replace(dense, model=None, start=start, train=train, techniques=(Upcycle(num_experts=8),))
