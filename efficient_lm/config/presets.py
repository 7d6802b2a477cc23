"""The two runs that every other config is a change of: the dense baseline and the mixture of experts, in their sizes.

They are part of the package, so that a config file works wherever it lies.
"""
from efficient_lm.config.experiment import Experiment, choose
from efficient_lm.config.mesh import Mesh
from efficient_lm.data import BPE, Corpus
from efficient_lm.models import zoo
from efficient_lm.training.optimizers import AdamW, Muon, WarmupCosine
from efficient_lm.training.train import Training

# By size: steps, sequences a step, tokens of each, optimizer, peak learning rate.
SIZES = {
  'tiny': (500, 16, 256, Muon, 5e-3),
  'small': (2_000, 32, 512, AdamW, 2e-3),
  'gpt2_124m': (10_000, 512, 1024, AdamW, 6e-4),
}
DENSE = {
  'tiny': zoo.tiny, 'small': zoo.small, 'gpt2_124m': zoo.gpt2_124m, 'llama3_8b': zoo.llama3_8b}
MIXTURES = {
  'tiny': lambda: zoo.tiny(zoo.experts(8, 2, 160)), 'small': lambda: zoo.small(zoo.experts(16, 2, 512)),
  'gpt2_124m': lambda: zoo.gpt2_124m(zoo.experts(8, 2, 1024)), 'mixtral_8x7b': zoo.mixtral_8x7b,
  'olmoe_1b_7b': zoo.olmoe_1b_7b, 'qwen3_30b_a3b': zoo.qwen3_30b_a3b, 'deepseek_v3': zoo.deepseek_v3}
PUBLISHED = {
  'llama3_8b': (10_000, 512, 8192, AdamW, 3e-4), 'mixtral_8x7b': (10_000, 512, 4096, AdamW, 3e-4),
  'olmoe_1b_7b': (10_000, 1024, 4096, AdamW, 4e-4), 'qwen3_30b_a3b': (10_000, 1024, 4096, AdamW, 3e-4),
  'deepseek_v3': (10_000, 4096, 4096, AdamW, 2e-4)}


def dense(variant: str = 'tiny') -> Experiment:
  """The dense baseline."""
  return _experiment(choose(variant, DENSE)(), variant)


def mixture(variant: str = 'tiny') -> Experiment:
  """The mixture of experts of the same active size."""
  return _experiment(choose(variant, MIXTURES)(), variant)


def _experiment(model, variant: str) -> Experiment:
  steps, batch_size, sequence_length, optimizer, peak = (SIZES | PUBLISHED)[variant]
  tokenizer = None if model.vocab_size == zoo.BYTES else BPE(vocab_size=min(model.vocab_size, 50_304))
  return Experiment(
    model=model, data=Corpus(tokenizer=tokenizer), mesh=Mesh(fsdp=-1, data=1),
    train=Training(steps=steps, batch_size=batch_size, sequence_length=sequence_length, eval_every=200,
                   optimizer=optimizer(schedule=WarmupCosine(peak=peak, warmup=steps // 20))))
