"""500 steps that teach what is left of SmolLM2-135M what the whole model says, on text of one's own:

  make smollm2
  python -m efficient_lm.main --config=experiments/smaller/recover.py:depth --workdir=runs/smollm2-depth \
    --config.data.source.train[0]=train.txt --config.data.source.heldout[0]=heldout.txt
  python -m efficient_lm.evaluate --run=runs/smollm2-depth --text=test.npy
"""
from efficient_lm.config import Experiment, Train, Training, choose
from efficient_lm.data import Corpus, TextFiles
from efficient_lm.interop.gguf.source import Gguf
from efficient_lm.techniques import Distill, Shape, Shrink
from efficient_lm.training.optimizers import AdamW, WarmupCosine

SHAPES = {'depth': Shape(layers=22), 'width': Shape(width=512, hidden=1152)}


def get_config(variant: str = 'depth') -> Experiment:
  shape, whole = choose(variant, SHAPES), Gguf(path='models/smollm2', parameters='float32')
  text = Corpus(source=TextFiles(train=('train.txt',), heldout=('heldout.txt',)))
  recovery = Training(steps=500, batch_size=1, sequence_length=256, checkpoint_every=100,
                      optimizer=AdamW(schedule=WarmupCosine(peak=2e-4, warmup=25)))
  return Experiment(start=whole, data=text, train=Training(steps=0, batch_size=1, sequence_length=256),
                    stages=(Shrink(to=shape, sequences=64), Train(training=recovery, techniques=(Distill(teacher=whole),))))
