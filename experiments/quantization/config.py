"""Which rounding costs what? One variant a run of the table: float-SEED, rtn-BITS-SEED, gptq-…, awq-…, qat-BITS-SEED.

  python -m efficient_lm.main --config=experiments/quantization/config.py:gptq-3-0 --workdir=runs/quantization/gptq-3-0

All but float start from runs/quantization/float-SEED and round the weights of the layers, 32 inputs to a scale, activations
staying float. rtn, gptq and awq train nothing; qat trains 200 more steps as rounded, and then stores.
"""
import dataclasses

from configs import baseline
from efficient_lm.errors import ConfigError
from efficient_lm.experiment import Experiment, FromRun
from efficient_lm.formats import Group, Int, MidRise
from efficient_lm.optim import Muon, WarmupCosine
from efficient_lm.rules import Rule
from efficient_lm.techniques.awq import Awq
from efficient_lm.techniques.convert import Convert
from efficient_lm.techniques.gptq import Gptq
from efficient_lm.techniques.post_training import Quantize, RoundToNearest
from efficient_lm.techniques.quant_aware import LearnedSteps, QuantAware, StretchedLevels

SCALES = Group(size=32)
METHODS = {'rtn': RoundToNearest(), 'gptq': Gptq(), 'awq': Awq()}
# Two bits: a zero point and four levels afterwards; in training four levels around zero, and three for 1.58 bits.
AFTERWARDS = {'8': Int(scales=SCALES), '4': Int(bits=4, scales=SCALES), '3': Int(bits=3, scales=SCALES),
              '2': Int(bits=2, symmetric=False, scales=SCALES)}
TRAINED = {'4': (Int(bits=4, scales=SCALES), LearnedSteps()), '3': (Int(bits=3, scales=SCALES), LearnedSteps()),
           '2': (MidRise(bits=2, scales=SCALES), StretchedLevels()), '1.58': (Int(bits=2, scales=SCALES), StretchedLevels())}


def get_config(variant: str = 'float-0') -> Experiment:
  method, *bits, seed = variant.split('-')
  experiment = dataclasses.replace(baseline.get_config(), seed=int(seed))
  if method == 'float': return experiment
  start = FromRun(path=f'runs/quantization/float-{seed}')
  experiment = dataclasses.replace(experiment, model=None, start=start)
  if method == 'qat':
    format, how = TRAINED[bits[0]]
    optimizer = Muon(schedule=WarmupCosine(peak=1e-3, warmup=10))
    return dataclasses.replace(
      experiment, techniques=(QuantAware(rules=(Rule(weights=format),), method=how),), stages=(Convert(),),
      train=dataclasses.replace(experiment.train, steps=200, optimizer=optimizer))
  if method not in METHODS: raise ConfigError('--config variant', variant, f'begin with float, qat, {", ".join(METHODS)}')
  stage = Quantize(rules=(Rule(weights=AFTERWARDS[bits[0]]),), method=METHODS[method])
  return dataclasses.replace(experiment, train=dataclasses.replace(experiment.train, steps=0), stages=(stage,))
