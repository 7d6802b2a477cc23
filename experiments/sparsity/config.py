"""What is done to the trained baseline, by its name in run.sh."""
import dataclasses

from efficient_lm import techniques as by
from efficient_lm.config import Experiment, choose, presets
from efficient_lm.formats import FullRangeInt, Group
from efficient_lm.runs import trained

INT4 = by.Rule(weights=FullRangeInt(bits=4, scales=Group(size=32), scale_dtype='float16'))
SCORES = {'magnitude': by.Magnitude, 'wanda': by.Wanda, 'sparsegpt': by.SparseGpt}


def stages_of() -> dict[str, tuple]:
  """By name."""
  found = {}
  for name, score in SCORES.items():
    found[f'{name}_50'] = (by.PruneOnce(sparsity=0.5, score=score()),)
    found[f'{name}_2_4'] = (by.PruneOnce(pattern=by.NofM(), score=score()),)
  found['magnitude_50_output'] = (by.PruneOnce(sparsity=0.5, pattern=by.PerOutput()),)
  found['wanda_50_matrix'] = (by.PruneOnce(sparsity=0.5, score=by.Wanda(), pattern=by.PerMatrix()),)
  int4 = lambda **zeros: by.Quantize(rules=(INT4,), method=by.Gptq(**zeros))
  found['int4'] = (int4(),)
  found['joint'] = (int4(sparsity=0.5),)
  found['one_after_the_other'] = (by.PruneOnce(sparsity=0.5, score=by.SparseGpt()), int4())
  return found


def get_config(variant: str) -> Experiment:
  dense = presets.dense('tiny')
  return dataclasses.replace(dense, model=None, start=trained(), stages=choose(variant, stages_of()),
                             train=dataclasses.replace(dense.train, steps=0))
