"""Low-precision training: every product of the layers in int8, forward and backward. What does it cost in quality?

  make low_precision
  python -m efficient_lm.main --config=configs/low_precision.py --workdir=runs/low_precision

float8_tiny and float8_gpt2_124m: in float8, e4m3 forward and e5m2 for gradients.
tiny (default): minutes on a CPU, 1.670 bits per byte, as the dense baseline has in float32 (one seed, experiments/pillars).
gpt2_124m: for one H100 or a v5e-8, not run yet.
"""
import dataclasses

from efficient_lm.config import Experiment, choose, presets
from efficient_lm.techniques import LowPrecisionTraining

FLOAT8 = LowPrecisionTraining(forward='float8_e4m3fn', dgrad='float8_e5m2', wgrad='float8_e5m2')


def get_config(variant: str = 'tiny') -> Experiment:
  kinds = {size: (size, LowPrecisionTraining()) for size in presets.DENSE}
  size, technique = choose(variant, kinds | {f'float8_{size}': (size, FLOAT8) for size in ('tiny', 'gpt2_124m')})
  return dataclasses.replace(presets.dense(size), techniques=(technique,))
