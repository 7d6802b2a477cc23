"""All four pillars in one run: a mixture of experts, taught by the dense baseline, pruned to half, in 8 bits.

  make baseline stacked
  python -m efficient_lm.main --config=configs/stacked.py --workdir=runs/stacked

tiny (default): 2 CPU cores, TODO-MEASURE minutes, TODO-MEASURE bits per byte at TODO-MEASURE bytes, beside
TODO-MEASURE at TODO-MEASURE of the dense row. gpt2_124m: one H100 or a v5e-8, TODO-MEASURE.
"""
import dataclasses

from configs import baseline, moe
from efficient_lm.experiment import Experiment
from efficient_lm.techniques.distill import Distill
from efficient_lm.techniques.prune import Prune
from efficient_lm.techniques.quant_aware import QuantAware


def get_config(variant: str = 'tiny') -> Experiment:
  teacher = baseline.trained(variant)
  mixture = moe.get_config(variant)
  steps = mixture.train.steps
  return dataclasses.replace(mixture, techniques=(
    Distill(teacher=teacher, weight=0.5),
    Prune(sparsity=0.5, start=steps // 10, end=steps * 2 // 3),
    QuantAware(bits=8, activation_bits=8),
  ))
