"""Pruning: half of every matrix to exact zeros while training; or a trained model with less of its width, depth or experts.

  make pruned
  python -m efficient_lm.main --config=configs/pruned.py --workdir=runs/pruned
  python -m efficient_lm.main --config=configs/pruned.py --config.techniques[0].sparsity=0.8
  make baseline && python -m efficient_lm.main --config=configs/pruned.py:depth --workdir=runs/depth
  python -m efficient_lm.main --config=configs/pruned.py:width --workdir=runs/width --config.start.path=FOLDER

`width` and `depth` start from runs/baseline, `experts` from runs/moe: what the model needs least is taken out of it, and
half as many steps as it was trained for recover. Each with _scratch at its end is the same shape trained from scratch on as
much text as that recovery reads; with --config.train.steps of both trainings, on as much as both. tiny (default): minutes on
a CPU, 1.758 bits per byte beside 1.670 of the dense baseline (one seed, experiments/pillars). gpt2_124m, behind all names:
for one H100 or a v5e-8, not run yet.
"""
import dataclasses

from efficient_lm.config import Experiment, choose, presets
from efficient_lm.runs import FromRun, trained
from efficient_lm.techniques import Prune, Shape, Shrink, SkipExperts, Train

SHAPES = {'width': Shape(width=0.75, hidden=0.75, multiple=8), 'depth': Shape(layers=0.75), 'experts': Shape(experts=0.5)}


def get_config(variant: str = 'tiny') -> Experiment:
  kinds = {'tiny': ('', 'tiny'), 'gpt2_124m': ('', 'gpt2_124m')}
  for kind in SHAPES:
    for name in (kind, f'{kind}_scratch'): kinds |= {name: (name, 'tiny'), f'{name}_gpt2_124m': (name, 'gpt2_124m')}
  kind, size = choose(variant, kinds)
  if not kind: return dataclasses.replace(presets.dense(size), techniques=(Prune(sparsity=0.5),))
  experts, shape = kind.startswith('experts'), SHAPES[kind.removesuffix('_scratch')]
  whole = presets.mixture(size) if experts else presets.dense(size)
  recovery = dataclasses.replace(whole.train, steps=whole.train.steps // 2)
  if kind.endswith('_scratch'): return dataclasses.replace(whole, model=shape.described(whole.model), train=recovery)
  start = FromRun(path='runs/moe' if size == 'tiny' else f'runs/moe-{size}') if experts else trained(size)
  stages = (Shrink(to=shape, sequences=64), Train(training=recovery), *([SkipExperts(sequences=64)] if experts else []))
  return dataclasses.replace(whole, model=None, start=start, stages=stages, train=dataclasses.replace(whole.train, steps=0))
