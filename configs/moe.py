"""Mixture of experts: what do eight times the experts buy at the same active parameters and FLOPs a token?

  make moe
  python -m efficient_lm.main --config=configs/moe.py --workdir=runs/moe
  python -m efficient_lm.main --config=configs/moe.py:gpt2_124m --config.mesh.expert=8

tiny (default): 4 min 46 s on 2 CPU cores, 1.60 bits per byte on held-out Python source. With 600 steps 1.53, beside 1.59 of
configs/baseline.py (means of three seeds). gpt2_124m: for one H100 or a v5e-8, not run yet. Published shapes: to plan with.
"""
from efficient_lm.config.experiment import Experiment, Mesh, Training, choose
from efficient_lm.data import BPE, Corpus
from efficient_lm.models import zoo
from efficient_lm.training.optimizers import AdamW, Muon, WarmupCosine


def get_config(variant: str = 'tiny') -> Experiment:
  model, steps, batch_size, sequence_length, optimizer, peak = choose(variant, {
    'tiny': (zoo.tiny(zoo.experts(8, 2, 160)), 500, 16, 256, Muon, 5e-3),
    'small': (zoo.small(zoo.experts(16, 2, 512)), 2_000, 32, 512, AdamW, 2e-3),
    'gpt2_124m': (zoo.gpt2_124m(zoo.experts(8, 2, 1024)), 10_000, 512, 1024, AdamW, 6e-4),
    'mixtral_8x7b': (zoo.mixtral_8x7b(), 10_000, 512, 4096, AdamW, 3e-4),
    'olmoe_1b_7b': (zoo.olmoe_1b_7b(), 10_000, 1024, 4096, AdamW, 4e-4),
    'qwen3_30b_a3b': (zoo.qwen3_30b_a3b(), 10_000, 1024, 4096, AdamW, 3e-4),
    'deepseek_v3': (zoo.deepseek_v3(), 10_000, 4096, 4096, AdamW, 2e-4),
  })
  tokenizer = None if model.vocab_size == zoo.BYTES else BPE(vocab_size=min(model.vocab_size, 50_304))
  return Experiment(
    model=model, data=Corpus(tokenizer=tokenizer), mesh=Mesh(fsdp=-1, data=1),
    train=Training(steps=steps, batch_size=batch_size, sequence_length=sequence_length, eval_every=200,
                   optimizer=optimizer(schedule=WarmupCosine(peak=peak, warmup=steps // 20))))
