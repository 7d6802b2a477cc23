"""Activations in few bits after training: what do they cost, and what do smoothing and rotating save of it?

  make baseline && make rounded_activations
  python -m efficient_lm.main --config=configs/rounded_activations.py:rotated --workdir=runs/rotated

plain (default; `tiny` is the same): weights and activations of the layers in 4 bits, rounded to nearest; smooth: channels
scaled first; rotated: turned first. All of size tiny and from runs/baseline: a minute on a CPU, in bits per byte beside
configs/baseline.py. For one H100: --config.start.path of a larger run, not run yet.
"""
import dataclasses

from configs import baseline
from efficient_lm.compression.rules import Rule
from efficient_lm.config.experiment import Experiment, choose
from efficient_lm.formats import Int
from efficient_lm.techniques.quantization.ptq import Quantize
from efficient_lm.techniques.quantization.rotate import Rotate
from efficient_lm.techniques.quantization.smooth_quant import SmoothQuant


def get_config(variant: str = 'tiny') -> Experiment:
  before = choose(variant, {'tiny': (), 'plain': (), 'smooth': (SmoothQuant(),), 'rotated': (Rotate(),)})
  experiment = baseline.get_config('tiny')
  stage = Quantize(rules=(Rule(weights=Int(bits=4), activations=Int(bits=4)),), before=before)
  train = dataclasses.replace(experiment.train, steps=0)
  return dataclasses.replace(experiment, model=None, start=baseline.trained('tiny'), train=train, stages=(stage,))
