"""Distillation: a student of half the width and depth learns from the dense baseline. Does the teacher beat the labels?

  make baseline distilled
  python -m efficient_lm.main --config=configs/distilled.py --workdir=runs/distilled
  python -m efficient_lm.main --config=configs/distilled.py --config.techniques[0].weight=0   (the labels alone)

tiny (default): minutes on a CPU, 2.040 bits per byte; with the labels alone 2.121 (one seed, experiments/pillars).
gpt2_124m: for one H100 or a v5e-8, not run yet; its teacher is runs/baseline-gpt2_124m.
"""
import dataclasses

from efficient_lm.config import Experiment, presets
from efficient_lm.models.spec import SwiGLU
from efficient_lm.runs import trained
from efficient_lm.techniques import Distill


def get_config(variant: str = 'tiny') -> Experiment:
  teacher, dense = trained(variant), presets.dense(variant)
  layers = dense.model.stacks[0]
  half = dataclasses.replace(layers, num_layers=layers.num_layers // 2, mlp=SwiGLU(hidden=layers.mlp.hidden // 2))
  return dataclasses.replace(dense, techniques=(Distill(teacher=teacher, weight=0.5),),
                             model=dataclasses.replace(dense.model, dim=dense.model.dim // 2, stacks=(half,)))
