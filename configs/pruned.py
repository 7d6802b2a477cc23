"""Pruning while training: half of every matrix to exact zeros by two thirds of the steps. What does it cost in quality?

  make pruned
  python -m efficient_lm.main --config=configs/pruned.py --workdir=runs/pruned
  python -m efficient_lm.main --config=configs/pruned.py:rigl --workdir=runs/rigl --config.techniques[0].sparsity=0.9

tiny (default): minutes on a CPU, 1.758 bits per byte beside 1.670 of the dense baseline (one seed, experiments/pillars).
Other ways to as many zeros, of size tiny: rigl, set, static are sparse from the first step on, as Erdos and Renyi share it
out; acdc and straight_through have dense weights too; movement, blocks and two_of_four are pruned by another score or
structure. gpt2_124m: for one H100 or a v5e-8, not run yet.
"""
import dataclasses

from efficient_lm.config import Experiment, choose, presets
from efficient_lm.techniques import (
  SET,
  AcDc,
  ByMovement,
  ErdosRenyi,
  NofM,
  Prune,
  RigL,
  SparseTraining,
  StaticMask,
  StraightThroughMask,
  Unstructured,
  WeightBlocks,
)

ERK = Unstructured(allocation=ErdosRenyi())
WHILE_TRAINING = {
  'rigl': lambda: SparseTraining(sparsity=0.5, method=RigL(every=10), structure=ERK),
  'set': lambda: SparseTraining(sparsity=0.5, method=SET(every=10), structure=ERK),
  'static': lambda: SparseTraining(sparsity=0.5, method=StaticMask(), structure=ERK),
  'acdc': lambda: SparseTraining(sparsity=0.5, method=AcDc()),
  'straight_through': lambda: SparseTraining(sparsity=0.5, method=StraightThroughMask()),
  'movement': lambda: SparseTraining(sparsity=0.5, method=StraightThroughMask(score=ByMovement())),
  'blocks': lambda: Prune(sparsity=0.5, structure=WeightBlocks(outputs=16, inputs=16)),
  'two_of_four': lambda: SparseTraining(sparsity=0.5, method=StraightThroughMask(), structure=NofM(n=2, m=4)),
}


def get_config(variant: str = 'tiny') -> Experiment:
  sizes = {size: (lambda: Prune(sparsity=0.5), size) for size in presets.DENSE}
  technique, size = choose(variant, sizes | {name: (made, 'tiny') for name, made in WHILE_TRAINING.items()})
  return dataclasses.replace(presets.dense(size), techniques=(technique(),))
