"""Quantization-aware training: which number format, learned how, costs how much quality?

  make quantized
  python -m efficient_lm.main --config=configs/quantized.py --workdir=runs/quantized
  python -m efficient_lm.main --config=configs/quantized.py:lsq3 --workdir=runs/quantized-lsq3

A variant is a kind from the dictionary below, of size tiny, or with _gpt2_124m at its end; `tiny` and `gpt2_124m` alone are
int4. Weights of the layers are rounded, activations to 8 bits, and float32 copies train.
tiny (default): minutes on a CPU. With 100 steps of 8 x 256 bytes and one seed, bits per byte: floats 2.965; 4 bits straight
through 2.990 (a scale to each channel); lsq3 3.038, straight through 3.074; int2 3.104, straight through 3.220; bitnet 3.150
at twice the peak. distilled_int4 needs `make baseline` first.
gpt2_124m: for one H100 or a v5e-8, not run yet.

BitNet wants an optimizer of its own: two to five times the peak of a float model and no weight decay in the second half:
  --config=configs/quantized.py:bitnet_gpt2_124m --config.train.optimizer.schedule.peak=1.8e-3
  --config.train.optimizer.decay_until=0.5
"""
import dataclasses

from configs import baseline
from efficient_lm.experiment import Experiment, choose
from efficient_lm.formats import Group, Int, MidRise
from efficient_lm.rules import Rule
from efficient_lm.techniques.bitnet import BitNet
from efficient_lm.techniques.convert import Convert
from efficient_lm.techniques.distill import Distill
from efficient_lm.techniques.quant_aware import LearnedSteps, QuantAware, StretchedLevels


def aware(weights, **more) -> QuantAware:
  return QuantAware(rules=(Rule(weights=weights, activations=Int()),), **more)


INT4 = aware(Int(bits=4, scales=Group(size=64)))
TECHNIQUES = {
  'int8': lambda size: (aware(Int()),),
  'int4': lambda size: (INT4,),
  'lsq3': lambda size: (aware(Int(bits=3), method=LearnedSteps()),),
  'int2': lambda size: (aware(MidRise(bits=2), method=StretchedLevels()),),
  'bitnet': lambda size: (BitNet(),),
  'distilled_int4': lambda size: (Distill(teacher=baseline.trained(size), weight=0.5), INT4),
}


def get_config(variant: str = 'tiny') -> Experiment:
  kinds = {f'{kind}{end}': (kind, size) for kind in TECHNIQUES for end, size in (('', 'tiny'), ('_gpt2_124m', 'gpt2_124m'))}
  kind, size = choose(variant, {'tiny': ('int4', 'tiny'), 'gpt2_124m': ('int4', 'gpt2_124m'), **kinds})
  return dataclasses.replace(baseline.get_config(size), techniques=TECHNIQUES[kind](size), stages=(Convert(),))
