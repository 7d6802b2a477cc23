"""LoRA: half of the trained baseline's weights are pruned, and adapters of rank 8 recover what they can, at exact zeros.

  make baseline adapted
  python -m efficient_lm.main --config=configs/adapted.py --workdir=runs/adapted
  python -m efficient_lm.main --config=configs/adapted.py --config.stages[1].techniques[0].rank=32

tiny (default): minutes on a CPU, 1.683 bits per byte after 250 steps; pruned it has 2.112, the baseline 1.670 (one seed).
gpt2_124m: for one H100 or a v5e-8, not run yet; it starts from runs/baseline-gpt2_124m.
"""
import dataclasses

from efficient_lm.config import Experiment, Train, presets
from efficient_lm.runs import trained
from efficient_lm.techniques import Lora, Merge, PruneOnce


def get_config(variant: str = 'tiny') -> Experiment:
  start, dense = trained(variant), presets.dense(variant)
  recovery = dataclasses.replace(dense.train, steps=dense.train.steps // 2)
  return dataclasses.replace(dense, model=None, start=start, train=dataclasses.replace(dense.train, steps=0), stages=(
    PruneOnce(sparsity=0.5), Train(training=recovery, techniques=(Lora(),)), Merge()))
