"""Quantization: which number format, trained or found afterwards, costs how much quality?

  make quantized
  python -m efficient_lm.main --config=configs/quantized.py:lsq3 --workdir=runs/lsq3
  make baseline && python -m efficient_lm.main --config=configs/quantized.py:gptq --workdir=runs/gptq

A variant is a kind from below, of size tiny, or with _gpt2_124m at its end. Those of TRAINED train weights of the layers as
rounded, most with 8-bit activations, and store them so at their end; those of AFTERWARDS start from runs/baseline, train
nothing and calibrate. tiny (default, int4): minutes on a CPU, in bits per byte beside configs/baseline.py; the table is in
experiments/quantization. gpt2_124m: for one H100 or a v5e-8, not run yet.

BitNet's recipe has a higher peak than a float model and no weight decay in the second half; not tried at that size:
--config.train.optimizer.schedule.peak=1.8e-3 --config.train.optimizer.decay_until=0.5 for bitnet_gpt2_124m.
"""
import dataclasses

from configs import baseline
from efficient_lm.compression.rules import Rule
from efficient_lm.config.experiment import Experiment, choose
from efficient_lm.formats import Group, Int, MidRise
from efficient_lm.techniques.distillation.distill import Distill
from efficient_lm.techniques.quantization.awq import Awq
from efficient_lm.techniques.quantization.bitnet import BitNet
from efficient_lm.techniques.quantization.convert import Convert
from efficient_lm.techniques.quantization.gptq import Gptq
from efficient_lm.techniques.quantization.low_precision_training import LowPrecisionTraining
from efficient_lm.techniques.quantization.ptq import Quantize
from efficient_lm.techniques.quantization.qat import LearnedSteps, QuantAware, StretchedLevels

GROUPS = Int(bits=4, scales=Group(size=32))
aware = lambda weights, **more: QuantAware(rules=(Rule(weights=weights, activations=Int()),), **more)
TRAINED = {
  'int8': lambda size: (aware(Int()),),
  'int4': lambda size: (aware(GROUPS),),
  'lsq3': lambda size: (aware(Int(bits=3), method=LearnedSteps()),),
  'int2': lambda size: (aware(MidRise(bits=2), method=StretchedLevels()),),
  'bitnet': lambda size: (BitNet(),),
  'distilled_int4': lambda size: (Distill(teacher=baseline.trained(size)), aware(GROUPS)),
  'fp8_training': lambda size: (LowPrecisionTraining(forward='float8_e4m3fn', dgrad='float8_e5m2', wgrad='float8_e5m2'),),
}
AFTERWARDS = {'gptq': Gptq(), 'awq': Awq()}


def get_config(variant: str = 'tiny') -> Experiment:
  kinds = {'tiny': ('int4', 'tiny'), 'gpt2_124m': ('int4', 'gpt2_124m')}
  for kind in TRAINED | AFTERWARDS: kinds |= {kind: (kind, 'tiny'), f'{kind}_gpt2_124m': (kind, 'gpt2_124m')}
  kind, size = choose(variant, kinds)
  experiment = baseline.get_config(size)
  if kind in TRAINED:
    stages = () if kind == 'fp8_training' else (Convert(),)
    return dataclasses.replace(experiment, techniques=TRAINED[kind](size), stages=stages)
  stages = Quantize(rules=(Rule(weights=GROUPS),), method=AFTERWARDS[kind]),
  train = dataclasses.replace(experiment.train, steps=0)
  return dataclasses.replace(experiment, model=None, start=baseline.trained(size), train=train, stages=stages)
