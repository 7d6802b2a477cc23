"""Activation sparsity: a feed-forward layer of squared ReLUs whose hidden units an L1 penalty drives to zero. At what cost?

  make active
  python -m efficient_lm.main --config=configs/active.py --workdir=runs/active
  make baseline && python -m efficient_lm.main --config=configs/active.py:teal --workdir=runs/teal

It has half as many hidden units again as the baseline, and so as many parameters as that with its gate. teal: the trained
baseline with 40 % of the inputs of every matrix zeroed by thresholds; decoding skips the rows of zeros where that is faster.
tiny (default): minutes on a CPU; bits per byte not measured yet. gpt2_124m, teal_gpt2_124m: for one H100 or a v5e-8, not run
yet.
"""
import dataclasses

from efficient_lm.config import Experiment, choose, presets
from efficient_lm.models.spec import L1, Plain
from efficient_lm.runs import trained
from efficient_lm.techniques import Teal


def get_config(variant: str = 'tiny') -> Experiment:
  kinds = {size: ('relu2', size) for size in presets.DENSE}
  kinds |= {'teal': ('teal', 'tiny'), 'teal_gpt2_124m': ('teal', 'gpt2_124m')}
  kind, size = choose(variant, kinds)
  dense = presets.dense(size)
  if kind == 'teal':
    untrained = dataclasses.replace(dense.train, steps=0)
    return dataclasses.replace(dense, model=None, start=trained(size), stages=(Teal(sparsity=0.4),), train=untrained)
  stack, = dense.model.stacks
  mlp = Plain(hidden=stack.mlp.hidden * 3 // 2, activation='relu2', biases=(), penalty=L1(weight=0.01))
  model = dataclasses.replace(dense.model, stacks=(dataclasses.replace(stack, mlp=mlp),))
  return dataclasses.replace(dense, model=model)
