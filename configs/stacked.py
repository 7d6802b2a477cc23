"""All four pillars in one run: a mixture of experts, taught by the dense baseline, pruned to half, in 8 bits.

  make baseline stacked
  python -m efficient_lm.main --config=configs/stacked.py --workdir=runs/stacked

tiny (default): minutes on a CPU. With 600 steps, for the teacher too, 1.588 bits per byte in 9 minutes on one core, beside
1.602 of the dense row and 1.549 of the plain mixture (one seed each). Weights are rounded but stored in float32: no byte
is saved yet. gpt2_124m: for one H100 or a v5e-8, not run yet.
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
