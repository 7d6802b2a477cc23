"""A config for tests: an experiment that trains in seconds on text whose entropy is known."""
import dataclasses

from efficient_lm.config import Experiment, Training
from efficient_lm.data import Corpus, Markov, TextFiles
from efficient_lm.models.moe.routing import LoadBalance, LossFreeBias, SoftmaxTopK
from efficient_lm.models.spec import GroupedQuery, MoE, Stack, SwiGLU, Transformer
from efficient_lm.training.optimizers import AdamW, WarmupCosine


def get_config(variant: str = 'moe') -> Experiment:
  mixture = MoE(num_experts=4, hidden=16, router=SoftmaxTopK(top_k=2), balance=(LoadBalance(), LossFreeBias()))
  mlp = {'dense': SwiGLU(hidden=32), 'quick': SwiGLU(hidden=32), 'moe': mixture}[variant]
  attention = GroupedQuery(num_heads=2, num_kv_heads=1, head_dim=8)
  if variant == 'quick': return _quick(mlp)
  language = Markov(alphabet=8, order=1, document_length=64, train_documents=256, heldout_documents=32)
  return Experiment(
    model=Transformer(vocab_size=8, dim=16, stacks=(Stack(num_layers=2, attention=attention, mlp=mlp),)),
    data=Corpus(source=language, eval_tokens=2048),
    train=Training(steps=24, batch_size=8, sequence_length=64, log_every=1, eval_every=12, checkpoint_every=6,
                   optimizer=AdamW(schedule=WarmupCosine(peak=1e-2, warmup=4))))


def over_bytes(folder, **changes) -> Experiment:
  """On text of bytes, which it writes into `folder`, and without training: every byte, and the end of a document, is about
  as likely as any other."""
  for i in range(6): (folder / f'{i}.txt').write_text(f'some text {i}, ä€😀 ' * 20)
  made = get_config('quick')
  text = Corpus(source=TextFiles(train=(f'{folder}/*.txt',), heldout_fraction=0.3), eval_tokens=128)
  return dataclasses.replace(made, data=text, model=dataclasses.replace(made.model, vocab_size=264),
                             train=dataclasses.replace(made.train, steps=0), **changes)


def _quick(mlp) -> Experiment:
  """Of a few steps, for what does not depend on how well a model is trained."""
  attention = GroupedQuery(num_heads=2, num_kv_heads=1, head_dim=8)
  language = Markov(alphabet=8, order=1, document_length=32, train_documents=64, heldout_documents=8)
  return Experiment(
    model=Transformer(vocab_size=8, dim=16, stacks=(Stack(num_layers=1, attention=attention, mlp=mlp),)),
    data=Corpus(source=language, eval_tokens=128),
    train=Training(steps=4, batch_size=8, sequence_length=32, log_every=1, eval_every=100, checkpoint_every=2,
                   optimizer=AdamW(schedule=WarmupCosine(peak=1e-2, warmup=2))))
