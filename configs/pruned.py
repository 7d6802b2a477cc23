"""Pruning: half of every matrix to exact zeros, while training or in one shot. What does it cost in quality?

  make pruned
  python -m efficient_lm.main --config=configs/pruned.py --workdir=runs/pruned
  python -m efficient_lm.main --config=configs/pruned.py --config.techniques[0].sparsity=0.8
  make baseline && python -m efficient_lm.main --config=configs/pruned.py:sparsegpt --workdir=runs/sparsegpt
  python -m efficient_lm.main --config=configs/pruned.py:wanda --config.start.path=runs/moe --workdir=runs/wanda

A variant is a kind, of size tiny, or with _gpt2_124m at its end. Of `gradual`, zeros grow until two thirds of the steps. The
others start from runs/baseline, train nothing and prune once: `magnitude` without data, `wanda` and `sparsegpt` calibrated,
`sparsegpt_2_4` in the pattern 2:4, `sparsegpt_int4` to 4 bits in the same pass; floats are packed, without their zeros. What
they do to a real model is in experiments/pruning. tiny (default, gradual): minutes on a CPU, 1.758 bits per byte beside
1.670 of the dense baseline (one seed, experiments/pillars). gpt2_124m: for one H100 or a v5e-8, not run yet.
"""
import dataclasses

from efficient_lm.config import Experiment, choose, presets
from efficient_lm.formats import FullRangeInt, Group
from efficient_lm.runs import trained
from efficient_lm.techniques import Gptq, NofM, Pack, Prune, PruneOnce, Quantize, Rule, SparseGpt, Wanda

INT4 = FullRangeInt(bits=4, scales=Group(size=32), scale_dtype='float16')
ONCE = {
  'magnitude': lambda: (PruneOnce(sparsity=0.5), Pack()),
  'wanda': lambda: (PruneOnce(sparsity=0.5, score=Wanda()), Pack()),
  'sparsegpt': lambda: (PruneOnce(sparsity=0.5, score=SparseGpt()), Pack()),
  'sparsegpt_2_4': lambda: (PruneOnce(pattern=NofM(n=2, m=4), score=SparseGpt()), Pack()),
  'sparsegpt_int4': lambda: (Quantize(rules=(Rule(weights=INT4),), method=Gptq(sparsity=0.5)),),
}


def get_config(variant: str = 'tiny') -> Experiment:
  kinds = {size: ('gradual', size) for size in presets.DENSE}
  for kind in ('gradual', *ONCE): kinds |= {kind: (kind, 'tiny'), f'{kind}_gpt2_124m': (kind, 'gpt2_124m')}
  kind, size = choose(variant, kinds)
  experiment = presets.dense(size)
  if kind == 'gradual': return dataclasses.replace(experiment, techniques=(Prune(sparsity=0.5),))
  untrained = dataclasses.replace(experiment.train, steps=0)
  return dataclasses.replace(experiment, model=None, start=trained(size), stages=ONCE[kind](), train=untrained)
