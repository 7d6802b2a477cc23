"""A recipe of five stages: train, prune to half, recover with QAT in 4 bits and a teacher, convert, quantize the rest.

  make baseline recipe
  python -m efficient_lm.main --config=configs/recipe.py --workdir=runs/recipe
  python -m efficient_lm.main --config=configs/recipe.py --config.stages[1].training.steps=300

Each stage has a row of its own, and is made again only if it, or what it was given, changes.
tiny (default): minutes on a CPU, 1.650 bits per byte in 0.46 MiB, after 250 steps more than the dense baseline, 1.670 in 2.8
MiB (one seed, experiments/pillars).
gpt2_124m: for one H100 or a v5e-8, not run yet; its teacher is runs/baseline-gpt2_124m.
"""
import dataclasses

from efficient_lm.config import Experiment, Train, presets
from efficient_lm.formats import Group, Int
from efficient_lm.runs import trained
from efficient_lm.techniques import Convert, Distill, PruneOnce, QuantAware, Quantize, Rule


def get_config(variant: str = 'tiny') -> Experiment:
  teacher, dense = trained(variant), presets.dense(variant)
  recovery = dataclasses.replace(dense.train, steps=dense.train.steps // 2)
  int4 = Rule(weights=Int(bits=4, scales=Group(size=32)))
  return dataclasses.replace(dense, stages=(
    PruneOnce(sparsity=0.5),
    Train(training=recovery, techniques=(Distill(teacher=teacher), QuantAware(rules=(int4,)))),
    Convert(),
    Quantize(rules=(Rule(where='embed|own_head', weights=Int()),)),
  ))
