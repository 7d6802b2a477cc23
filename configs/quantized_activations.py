"""Activations in few bits after training: what do they cost, and what do smoothing and rotation save of it?

  make baseline && make quantized_activations
  python -m efficient_lm.main --config=configs/quantized_activations.py:rotated --workdir=runs/rotated

plain (default; `tiny` is the same): weights and activations of the layers in 4 bits, by round-to-nearest; smooth: with
SmoothQuant before; rotated: with Rotate (QuaRot) before. All of size tiny and from runs/baseline: a minute on a CPU, in
bits per byte beside configs/baseline.py. For one H100: --config.start.path of a larger run, not run yet.
"""
import dataclasses

from efficient_lm.config import Experiment, choose, presets
from efficient_lm.formats import Int
from efficient_lm.runs import trained
from efficient_lm.techniques import Quantize, Rotate, Rule, SmoothQuant


def get_config(variant: str = 'tiny') -> Experiment:
  before = choose(variant, {'tiny': (), 'plain': (), 'smooth': (SmoothQuant(),), 'rotated': (Rotate(),)})
  experiment = presets.dense()
  stage = Quantize(rules=(Rule(weights=Int(bits=4), activations=Int(bits=4)),), before=before)
  train = dataclasses.replace(experiment.train, steps=0)
  return dataclasses.replace(experiment, model=None, start=trained(), train=train, stages=(stage,))
