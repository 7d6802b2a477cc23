"""Quantization-aware training: 4-bit weights and 8-bit activations from the first step. What does it cost in quality?

  make quantized
  python -m efficient_lm.main --config=configs/quantized.py --workdir=runs/quantized
  python -m efficient_lm.main --config=configs/quantized.py --config.techniques[0].bits=2

tiny (default): minutes on a CPU. With 600 steps 1.658 bits per byte beside 1.602 of the dense row (one seed each), in 5
minutes on one core. The weights are rounded but stored in float32: no byte is saved yet.
gpt2_124m: for one H100 or a v5e-8, not run yet.
"""
import dataclasses

from configs import baseline
from efficient_lm.experiment import Experiment
from efficient_lm.techniques.quant_aware import QuantAware


def get_config(variant: str = 'tiny') -> Experiment:
  return dataclasses.replace(baseline.get_config(variant), techniques=(QuantAware(bits=4, activation_bits=8),))
