"""Quantization-aware training: 4-bit weights and 8-bit activations from the first step. What does it cost in quality?

  make quantized
  python -m efficient_lm.main --config=configs/quantized.py --workdir=runs/quantized
  python -m efficient_lm.main --config=configs/quantized.py --config.techniques[0].bits=2

tiny (default): 2 CPU cores, TODO-MEASURE minutes, TODO-MEASURE bits per byte beside TODO-MEASURE of the dense row,
at TODO-MEASURE of its bytes. gpt2_124m: one H100 or a v5e-8, TODO-MEASURE.
"""
import dataclasses

from configs import baseline
from efficient_lm.experiment import Experiment
from efficient_lm.techniques.quant_aware import QuantAware


def get_config(variant: str = 'tiny') -> Experiment:
  return dataclasses.replace(baseline.get_config(variant), techniques=(QuantAware(bits=4, activation_bits=8),))
