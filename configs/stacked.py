"""All four pillars in one run: a mixture of experts, taught by the dense baseline, pruned to half, in 8 bits.

  make baseline stacked
  python -m efficient_lm.main --config=configs/stacked.py --workdir=runs/stacked

tiny (default): minutes on a CPU. With 600 steps, for the teacher too, 1.588 bits per byte in 9 minutes on one core, beside
1.602 of the dense row and 1.549 of the plain mixture (one seed each). Weights are rounded but stored in float32: no byte
is saved yet. gpt2_124m: for one H100 or a v5e-8, not run yet.
"""
import dataclasses

from configs import baseline, moe
from efficient_lm.compression.rules import Rule
from efficient_lm.config.experiment import Experiment
from efficient_lm.formats import Int
from efficient_lm.techniques.distillation.distill import Distill
from efficient_lm.techniques.pruning.prune import Prune
from efficient_lm.techniques.quantization.qat import QuantAware


def get_config(variant: str = 'tiny') -> Experiment:
  teacher = baseline.trained(variant)
  mixture = moe.get_config(variant)
  steps = mixture.train.steps
  return dataclasses.replace(mixture, techniques=(
    Distill(teacher=teacher, weight=0.5),
    Prune(sparsity=0.5, start=steps // 10, end=steps * 2 // 3),
    QuantAware(rules=(Rule(weights=Int(), activations=Int()),)),
  ))
