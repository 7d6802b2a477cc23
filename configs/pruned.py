"""Pruning: zeros while training or in one shot, or a trained model with less of its width, depth or experts. At what cost?

  make pruned
  python -m efficient_lm.main --config=configs/pruned.py --config.techniques[0].sparsity=0.8 --workdir=runs/pruned-80
  make baseline && python -m efficient_lm.main --config=configs/pruned.py:sparsegpt --workdir=runs/sparsegpt
  python -m efficient_lm.main --config=configs/pruned.py:depth --config.start.path=FOLDER --workdir=runs/depth

Variants are of size tiny, or of another with its name at their end (wanda_gpt2_124m).
While training: gradual (tiny alone means it) ends with half of each matrix zero at two thirds of the steps. rigl, set and
static are sparse from the first step on; acdc, straight_through, movement and 2_4 have dense weights too.
Of runs/baseline, or another trained model: magnitude, wanda, sparsegpt, sparsegpt_2_4 prune once and pack what is left;
sparsegpt_int4 goes to 4 bits in the same pass. width, depth and (of runs/moe) experts take out what is needed least, and
half as many steps as it was trained for recover; with _scratch they train that shape from scratch on as much text. block
leaves a quarter of all blocks, which are stored, multiplied and trained alone.
tiny: minutes on a CPU; gradual 1.758 bits per byte beside 1.670 of the dense baseline (one seed, experiments/pillars); of a
real model in experiments/pruning and experiments/smaller. gpt2_124m: for one H100 or a v5e-8, not run yet.
"""
import copy
import dataclasses

from efficient_lm import techniques as by
from efficient_lm.config import Experiment, Train, choose, presets
from efficient_lm.formats import FullRangeInt, Group
from efficient_lm.runs import FromRun

INT4 = by.Rule(weights=FullRangeInt(bits=4, scales=Group(size=32), scale_dtype='float16'))
sparse = lambda method, **more: (by.SparseTraining(sparsity=0.5, method=method, **more),)
once = lambda **how: (by.PruneOnce(**how), by.Pack())
TRAINING = {
  '': (by.Prune(sparsity=0.5),), 'gradual': (by.Prune(sparsity=0.5),),
  'static': sparse(by.StaticMask(), allocation=by.Erk()), 'acdc': sparse(by.AcDc()),
  'rigl': sparse(by.RigL(every=10), allocation=by.Erk()), 'set': sparse(by.SET(every=10), allocation=by.Erk()),
  'straight_through': sparse(by.StraightThroughMask()), '2_4': sparse(by.StraightThroughMask(), pattern=by.NofM()),
  'movement': sparse(by.StraightThroughMask(score=by.Movement())),
}
ONCE = {
  'magnitude': once(sparsity=0.5), 'wanda': once(sparsity=0.5, score=by.Wanda()),
  'sparsegpt': once(sparsity=0.5, score=by.SparseGpt()), 'sparsegpt_2_4': once(pattern=by.NofM(), score=by.SparseGpt()),
  'sparsegpt_int4': (by.Quantize(rules=(INT4,), method=by.Gptq(sparsity=0.5)),),
}
SHAPES = {'width': by.Shape(width=0.75, hidden=0.75, multiple=8), 'depth': by.Shape(layers=0.75),
          'experts': by.Shape(experts=0.5)}
BLOCK = {'tiny': (8, 32), 'gpt2_124m': (32, 64)}
SCRATCH = {f'{kind}_scratch': shape for kind, shape in SHAPES.items()}


def get_config(variant: str = 'tiny') -> Experiment:
  sizes, kinds = {'tiny': '', 'gpt2_124m': '_gpt2_124m'}, {size: ('', size) for size in presets.DENSE}
  for kind in filter(None, (*TRAINING, *ONCE, *SHAPES, *SCRATCH, 'block')):
    kinds |= {f'{kind}{end}': (kind, size) for size, end in sizes.items()}
  kind, size = choose(variant, kinds)
  whole = presets.mixture(size) if 'experts' in kind else presets.dense(size)
  recovery = dataclasses.replace(whole.train, steps=whole.train.steps // 2)
  if kind in TRAINING: return dataclasses.replace(whole, techniques=copy.deepcopy(TRAINING[kind]))
  if kind in SCRATCH: return dataclasses.replace(whole, model=SCRATCH[kind].described(whole.model), train=recovery)
  start = FromRun(path=f'runs/{"moe" if "experts" in kind else "baseline"}{sizes[size].replace("_", "-", 1)}')
  if kind in ONCE: stages = copy.deepcopy(ONCE[kind])
  else:
    first = by.PruneBlocks(sparsity=0.75, block=BLOCK[size]) if kind == 'block' else by.Shrink(to=SHAPES[kind], sequences=64)
    stages = (first, Train(training=recovery), *[by.SkipExperts()] * (kind == 'experts'))
  return dataclasses.replace(whole, model=None, start=start, stages=stages, train=dataclasses.replace(whole.train, steps=0))
