"""Pruning: zeros while training or in one shot, or a trained model with less of its width, depth or experts. At what cost?

  make pruned
  python -m efficient_lm.main --config=configs/pruned.py --config.techniques[0].sparsity=0.8 --workdir=runs/pruned-80
  make baseline && python -m efficient_lm.main --config=configs/pruned.py:sparsegpt --workdir=runs/sparsegpt
  python -m efficient_lm.main --config=configs/pruned.py:depth --config.start.path=FOLDER --workdir=runs/depth

Variants are of size tiny, or of another with its name at their end (wanda_gpt2_124m).
While training: gradual (tiny alone means it) ends with half of each matrix zero at two thirds of the steps.
Of runs/baseline, or another trained model: magnitude, wanda, sparsegpt, sparsegpt_2_4 prune once and pack what is left;
sparsegpt_int4 goes to 4 bits in the same pass. width, depth and (of runs/moe) experts take out what is needed least, and
half as many steps as it was trained for recover; with _scratch they train that shape from nothing on as much text.
tiny: minutes on a CPU; gradual 1.758 bits per byte beside 1.670 of the dense baseline (one seed, experiments/pillars). A real
model is in experiments/pruning and experiments/smaller. gpt2_124m: for one H100 or a v5e-8, not run yet.
"""
import copy
import dataclasses

from efficient_lm.config import Experiment, Train, choose, presets
from efficient_lm.formats import FullRangeInt, Group
from efficient_lm.runs import FromRun
from efficient_lm.techniques import (
  Gptq,
  NofM,
  Pack,
  Prune,
  PruneOnce,
  Quantize,
  Rule,
  Shape,
  Shrink,
  SkipExperts,
  SparseGpt,
  Wanda,
)

INT4 = FullRangeInt(bits=4, scales=Group(size=32), scale_dtype='float16')
TRAINING = {'': (Prune(sparsity=0.5),), 'gradual': (Prune(sparsity=0.5),)}
ONCE = {
  'magnitude': (PruneOnce(sparsity=0.5), Pack()), 'wanda': (PruneOnce(sparsity=0.5, score=Wanda()), Pack()),
  'sparsegpt': (PruneOnce(sparsity=0.5, score=SparseGpt()), Pack()),
  'sparsegpt_2_4': (PruneOnce(pattern=NofM(n=2, m=4), score=SparseGpt()), Pack()),
  'sparsegpt_int4': (Quantize(rules=(Rule(weights=INT4),), method=Gptq(sparsity=0.5)),),
}
SHAPES = {'width': Shape(width=0.75, hidden=0.75, multiple=8), 'depth': Shape(layers=0.75), 'experts': Shape(experts=0.5)}
SCRATCH = {f'{kind}_scratch': shape for kind, shape in SHAPES.items()}


def get_config(variant: str = 'tiny') -> Experiment:
  sizes, kinds = {'tiny': '', 'gpt2_124m': '_gpt2_124m'}, {size: ('', size) for size in presets.DENSE}
  for kind in (*TRAINING, *ONCE, *SHAPES, *SCRATCH):
    if kind: kinds |= {f'{kind}{end}': (kind, size) for size, end in sizes.items()}
  kind, size = choose(variant, kinds)
  whole = presets.mixture(size) if 'experts' in kind else presets.dense(size)
  recovery = dataclasses.replace(whole.train, steps=whole.train.steps // 2)
  if kind in TRAINING: return dataclasses.replace(whole, techniques=copy.deepcopy(TRAINING[kind]))
  if kind in SCRATCH: return dataclasses.replace(whole, model=SCRATCH[kind].described(whole.model), train=recovery)
  start = FromRun(path=f'runs/{"moe" if "experts" in kind else "baseline"}{sizes[size].replace("_", "-", 1)}')
  stages = copy.deepcopy(ONCE[kind]) if kind in ONCE else (
    Shrink(to=SHAPES[kind], sequences=64), Train(training=recovery), *[SkipExperts(sequences=64)] * (kind == 'experts'))
  return dataclasses.replace(whole, model=None, start=start, stages=stages, train=dataclasses.replace(whole.train, steps=0))
