"""Quantization: which number format, by training or after it, costs how much quality?

  make quantized
  python -m efficient_lm.main --config=configs/quantized.py:lsq3 --workdir=runs/lsq3
  make baseline && python -m efficient_lm.main --config=configs/quantized.py:gptq --workdir=runs/gptq

A variant is a kind from below, of size tiny, or with _gpt2_124m at its end. Those of QAT are quantization-aware training of
the layers' weights, most with 8-bit activations, and store them in their format at the end; those of PTQ start from
runs/baseline, train nothing, calibrate and quantize, embedding and head to 8 bits, with scales in float16, as files of GGUF
and compressed-tensors hold them. Of `mixed`, mixed precision, the layers are taken apart: the first and the last are stored
in 8 bits, the others in 4. tiny (default, int4): minutes on a CPU, in bits per byte beside configs/baseline.py; the table is
in experiments/quantization. gpt2_124m: for one H100 or a v5e-8, not run yet.

BitNet's recipe has a higher peak than a float model and no weight decay in the second half; not tried at that size:
--config.train.optimizer.schedule.peak=1.8e-3 --config.train.optimizer.decay_until=0.5 for bitnet_gpt2_124m.
"""
import dataclasses

from efficient_lm.config import Experiment, choose, presets
from efficient_lm.formats import FullRangeInt, Group, Int, MidRise
from efficient_lm.runs import trained
from efficient_lm.techniques import (
  Awq,
  BitNet,
  Convert,
  Distill,
  Gptq,
  LearnedSteps,
  QuantAware,
  Quantize,
  Rule,
  StretchedLevels,
  Unroll,
)

GROUPS = Int(bits=4, scales=Group(size=32))
aware = lambda weights, **more: QuantAware(rules=(Rule(weights=weights, activations=Int()),), **more)
QAT = {
  'int8': lambda size: (aware(Int()),),
  'int4': lambda size: (aware(GROUPS),),
  'lsq3': lambda size: (aware(Int(bits=3), method=LearnedSteps()),),
  'int2': lambda size: (aware(MidRise(bits=2), method=StretchedLevels()),),
  'bitnet': lambda size: (BitNet(),),
  'distilled_int4': lambda size: (Distill(teacher=trained(size)), aware(GROUPS)),
}
four, eight = (kind(scales=GROUPS.scales, scale_dtype='float16') for kind in (FullRangeInt, Int))
ptq = lambda method, *rules: Quantize(rules=(*rules, Rule(weights=four), Rule(where='embed|own_head', weights=eight)),
                                      method=method)
PTQ = {'gptq': lambda last: (ptq(Gptq()),), 'awq': lambda last: (ptq(Awq()),),
       'mixed': lambda last: (Unroll(), ptq(Gptq(), Rule(where=rf'/blocks/(0|{last})/', weights=eight)))}


def get_config(variant: str = 'tiny') -> Experiment:
  kinds = {'tiny': ('int4', 'tiny'), 'gpt2_124m': ('int4', 'gpt2_124m')}
  for kind in QAT | PTQ: kinds |= {kind: (kind, 'tiny'), f'{kind}_gpt2_124m': (kind, 'gpt2_124m')}
  kind, size = choose(variant, kinds)
  experiment = presets.dense(size)
  if kind in QAT: return dataclasses.replace(experiment, techniques=QAT[kind](size), stages=(Convert(),))
  stages, untrained = PTQ[kind](experiment.model.stacks[0].num_layers - 1), dataclasses.replace(experiment.train, steps=0)
  return dataclasses.replace(experiment, model=None, start=trained(size), stages=stages, train=untrained)
