"""Low-precision training: every product of the layers in int8, forward and backward. What does it cost in quality?

  make low_precision
  python -m efficient_lm.main --config=configs/low_precision.py --workdir=runs/low_precision

Float8 instead: --config.techniques[0].forward=float8_e4m3fn, and float8_e5m2 for .dgrad and .wgrad.

tiny (default): minutes on a CPU. With 150 steps (--config.train.steps=150) 2.516 bits per byte beside 2.505 of the dense
row; 2.512 rounded to the nearest, 2.511 with int8 forward alone, 2.528 in float8 (one seed each).
gpt2_124m: for one H100 or a v5e-8, not run yet.
"""
import dataclasses

from efficient_lm.config import Experiment, presets
from efficient_lm.techniques import LowPrecisionTraining


def get_config(variant: str = 'tiny') -> Experiment:
  return dataclasses.replace(presets.dense(variant), techniques=(LowPrecisionTraining(),))
