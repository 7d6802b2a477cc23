"""Dense baseline: the row that every technique is compared with.

  make baseline
  python -m efficient_lm.main --config=configs/baseline.py --workdir=runs/baseline

tiny (default): minutes on a CPU. With 600 steps 1.59 bits per byte on held-out Python source (mean of three seeds), in 5 to
7 minutes on one core.
gpt2_124m: for one H100 or a v5e-8, not run yet. llama3_8b: to plan with and for a pod.
"""
from efficient_lm.config.experiment import Experiment, FromRun, Mesh, Training, choose
from efficient_lm.data import BPE, Corpus
from efficient_lm.models import zoo
from efficient_lm.training.optimizers import AdamW, Muon, WarmupCosine


def get_config(variant: str = 'tiny') -> Experiment:
  model, steps, batch_size, sequence_length, optimizer, peak = choose(variant, {
    'tiny': (zoo.tiny(), 500, 16, 256, Muon, 5e-3),
    'small': (zoo.small(), 2_000, 32, 512, AdamW, 2e-3),
    'gpt2_124m': (zoo.gpt2_124m(), 10_000, 512, 1024, AdamW, 6e-4),
    'llama3_8b': (zoo.llama3_8b(), 10_000, 512, 8192, AdamW, 3e-4),
  })
  tokenizer = None if model.vocab_size == zoo.BYTES else BPE(vocab_size=min(model.vocab_size, 50_304))
  return Experiment(
    model=model, data=Corpus(tokenizer=tokenizer), mesh=Mesh(fsdp=-1, data=1),
    train=Training(steps=steps, batch_size=batch_size, sequence_length=sequence_length, eval_every=200,
                   optimizer=optimizer(schedule=WarmupCosine(peak=peak, warmup=steps // 20))))


def trained(variant: str) -> FromRun:
  """The run of this config, where `make baseline` keeps it: what others start or learn from."""
  return FromRun(path=choose(variant, {
    'tiny': 'runs/baseline', 'small': 'runs/baseline-small', 'gpt2_124m': 'runs/baseline-gpt2_124m'}))
