"""Pruning while training: half of every matrix to exact zeros by two thirds of the steps. What does it cost in quality?

  make pruned
  python -m efficient_lm.main --config=configs/pruned.py --workdir=runs/pruned
  python -m efficient_lm.main --config=configs/pruned.py --config.techniques[0].sparsity=0.8
  python -m efficient_lm.main --config=configs/pruned.py:block --workdir=runs/pruned-block
  make baseline && python -m efficient_lm.main --config=configs/pruned.py:teal --workdir=runs/teal

tiny (default): minutes on a CPU, 1.758 bits per byte beside 1.670 of the dense baseline (one seed, experiments/pillars).
gpt2_124m: for one H100 or a v5e-8, not run yet.

Variants that are stored or run sparse, of size tiny, or with _gpt2_124m at their end; not run in full yet:
block: the dense model is trained, three quarters of the blocks of its layers' matrices are dropped, and those that are left
are trained for half as many steps. teal: runs/baseline with 40 % of the inputs of every matrix zeroed. relu2: a feed-forward
layer of squared ReLUs whose hidden units an L1 penalty drives to zero.
"""
import dataclasses

from efficient_lm.config import Experiment, Train, choose, presets
from efficient_lm.models.spec import L1, Plain
from efficient_lm.runs import trained
from efficient_lm.techniques import Prune, PruneBlocks, Teal

BLOCK = {'tiny': (8, 32), 'gpt2_124m': (32, 64)}
SPARSE = {'block': lambda size, dense: dataclasses.replace(dense, stages=(
            PruneBlocks(sparsity=0.75, block=BLOCK[size]),
            Train(training=dataclasses.replace(dense.train, steps=dense.train.steps // 2)))),
          'teal': lambda size, dense: dataclasses.replace(
            dense, model=None, start=trained(size), stages=(Teal(sparsity=0.4),),
            train=dataclasses.replace(dense.train, steps=0)),
          'relu2': lambda size, dense: dataclasses.replace(dense, model=_squared(dense.model))}


def _squared(model):
  """With half as many hidden units again: as many parameters as with a gate."""
  stack, = model.stacks
  mlp = Plain(hidden=stack.mlp.hidden * 3 // 2, activation='relu2', biases=(), penalty=L1(weight=0.01))
  return dataclasses.replace(model, stacks=(dataclasses.replace(stack, mlp=mlp),))


def get_config(variant: str = 'tiny') -> Experiment:
  kinds = {size: (None, size) for size in presets.DENSE}
  for size in BLOCK: kinds |= {kind if size == 'tiny' else f'{kind}_{size}': (kind, size) for kind in SPARSE}
  kind, size = choose(variant, kinds)
  if kind: return SPARSE[kind](size, presets.dense(size))
  return dataclasses.replace(presets.dense(size), techniques=(Prune(sparsity=0.5),))
