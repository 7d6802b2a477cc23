"""What does quantization cost, by which method? One variant a run of the table: METHOD-BITS-SEED, or METHOD-SEED for floats.

  python -m efficient_lm.main --config=experiments/quantization/config.py:gptq-3-0 --workdir=runs/quantization/gptq-3-0

float is configs/baseline.py, and more trains it for 200 steps more. rtn, gptq and awq are PTQ of float, gptq_more is PTQ of
more, and train nothing; qat is QAT from float, for 200 steps as more has, and then stores its weights. All quantize the
weights of the layers, 32 inputs to a scale, activations staying float. whole-4-SEED is about bytes: a model of 14 million
parameters, not trained, all of it in 4 bits, 128 inputs to a scale.
"""
import dataclasses

from efficient_lm.config import Experiment, presets
from efficient_lm.errors import ConfigError
from efficient_lm.formats import Group, Int, MidRise
from efficient_lm.runs import FromRun
from efficient_lm.techniques import (
  Awq,
  Convert,
  Gptq,
  LearnedSteps,
  QuantAware,
  Quantize,
  RoundToNearest,
  Rule,
  StretchedLevels,
)
from efficient_lm.training.optimizers import Muon, WarmupCosine

SCALES = Group(size=32)
METHODS = {'rtn': RoundToNearest(), 'gptq': Gptq(), 'awq': Awq(), 'gptq_more': Gptq()}
# Of 2 bits, PTQ has four levels and a zero point; QAT has four levels around zero, and three for 1.58 bits.
PTQ = {'8': Int(scales=SCALES), '4': Int(bits=4, scales=SCALES), '3': Int(bits=3, scales=SCALES),
       '2': Int(bits=2, symmetric=False, scales=SCALES)}
QAT = {'4': (Int(bits=4, scales=SCALES), LearnedSteps()), '3': (Int(bits=3, scales=SCALES), LearnedSteps()),
       '2': (MidRise(bits=2, scales=SCALES), StretchedLevels()), '1.58': (Int(bits=2, scales=SCALES), StretchedLevels())}
WHOLE = (Rule(where='stacks/|embed', weights=Int(bits=4, scales=Group(size=128))),)


def get_config(variant: str = 'float-0') -> Experiment:
  method, *bits, seed = variant.split('-')
  experiment = dataclasses.replace(presets.dense('small' if method == 'whole' else 'tiny'), seed=int(seed))
  if method == 'float': return experiment
  untrained = dataclasses.replace(experiment, train=dataclasses.replace(experiment.train, steps=0))
  if method == 'whole': return dataclasses.replace(untrained, stages=(Quantize(rules=WHOLE),))
  if method in ('more', 'qat'):
    longer = dataclasses.replace(experiment.train, steps=200, optimizer=Muon(schedule=WarmupCosine(peak=1e-3, warmup=10)))
    experiment = dataclasses.replace(experiment, model=None, start=earlier('float', seed), train=longer)
    if method == 'more': return experiment
    format, how = QAT[bits[0]]
    return dataclasses.replace(
      experiment, techniques=(QuantAware(rules=(Rule(weights=format),), method=how),), stages=(Convert(),))
  if method not in METHODS:
    raise ConfigError('--config variant', variant, f'begin with float, more, qat, whole, {", ".join(METHODS)}')
  stage = Quantize(rules=(Rule(weights=PTQ[bits[0]]),), method=METHODS[method])
  start = earlier('more' if method == 'gptq_more' else 'float', seed)
  return dataclasses.replace(untrained, model=None, start=start, stages=(stage,))


def earlier(method: str, seed: str) -> FromRun:
  return FromRun(path=f'runs/quantization/{method}-{seed}')
