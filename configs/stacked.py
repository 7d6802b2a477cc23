"""All four pillars in one run: a mixture of experts, taught by the dense baseline, pruned to half, in 8 bits.

  make baseline stacked
  python -m efficient_lm.main --config=configs/stacked.py --workdir=runs/stacked

tiny (default): minutes on a CPU, 1.655 bits per byte in 2.3 MiB, beside 1.670 in 2.8 MiB of the dense baseline and 1.604 in
8.4 MiB of the plain mixture (one seed, experiments/pillars). gpt2_124m: for one H100 or a v5e-8, not run yet.
"""
import dataclasses

from efficient_lm.config import Experiment, presets
from efficient_lm.formats import Int
from efficient_lm.runs import trained
from efficient_lm.techniques import Convert, Distill, Prune, QuantAware, Rule


def get_config(variant: str = 'tiny') -> Experiment:
  teacher = trained(variant)
  return dataclasses.replace(presets.mixture(variant), stages=(Convert(),), techniques=(
    Distill(teacher=teacher, weight=0.5),
    Prune(sparsity=0.5),
    QuantAware(rules=(Rule(weights=Int(), activations=Int()),)),
  ))
