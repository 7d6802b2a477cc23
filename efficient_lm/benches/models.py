"""Cases that run a whole model against PyTorch: training a dense model or a mixture of experts, and decoding."""
import functools
import importlib.util
from collections.abc import Callable

import jax
import numpy as np

from efficient_lm import formats
from efficient_lm.benches.result import OURS, Case, Disagreement, difference, within
from efficient_lm.data.packing import Rows, Stream
from efficient_lm.models import decode
from efficient_lm.models import spec as specs
from efficient_lm.runs import measure
from efficient_lm.training.learner import assemble, initial_state, new_model
from efficient_lm.training.optimizers import AdamW, WarmupCosine
from efficient_lm.training.trainer import compiled_step
from efficient_lm.tree import rewrite
from efficient_lm.weights.quantized import round_to_nearest
from efficient_lm.weights.quantizers import Rounding
from efficient_lm.weights.weight import Weight

STEPS = 1_000      # steps of the schedule, more than are timed
COMPARED = 4       # steps whose losses must agree: the learning rate of the first is 0 (warm-up), the next ones move weights
TOLERANCE = {'float32': 1e-4, 'bfloat16': 2e-2}   # relative difference of losses


def installed() -> bool:
  """Whether the baselines are installed, and PyTorch computes on the kind of device that JAX does."""
  if not all(map(importlib.util.find_spec, ('torch', 'transformers'))): return False
  from efficient_lm.benches import torch_models
  return jax.default_backend() == ('gpu' if torch_models.device().type == 'cuda' else 'cpu')


def dtype() -> str:
  """The dtype in which models compute on this device."""
  return 'float32' if jax.default_backend() == 'cpu' else 'bfloat16'


def ten_million(mlp=None, num_kv_heads: int = 6) -> specs.Transformer:
  """Six layers of width 384 over bytes: 11 million parameters with the dense `mlp` of the default."""
  attention = specs.GroupedQuery(num_heads=6, num_kv_heads=num_kv_heads, head_dim=64)
  stack = specs.Stack(num_layers=6, attention=attention, mlp=mlp or specs.SwiGLU(hidden=1024), unroll=6)
  return specs.Transformer(vocab_size=320, dim=384, stacks=(stack,), dtype=dtype())


def little(mlp=None, num_kv_heads: int = 2) -> specs.Transformer:
  """Two layers of width 64, to see that everything runs."""
  attention = specs.GroupedQuery(num_heads=4, num_kv_heads=num_kv_heads, head_dim=16)
  stack = specs.Stack(num_layers=2, attention=attention, mlp=mlp or specs.SwiGLU(hidden=128))
  return specs.Transformer(vocab_size=320, dim=64, stacks=(stack,), dtype=dtype())


def mixture(num_experts: int, hidden: int) -> specs.MoE:
  """A mixture with two of `num_experts` for each token, and no balancing loss, because the baseline defines its own
  differently."""
  router = specs.routing.SoftmaxTopK(top_k=2)
  return specs.MoE(num_experts=num_experts, hidden=hidden, router=router, balance=())


def random_batch(spec: specs.Transformer, batch_size: int, length: int, document: int | None = None):
  """A batch of random tokens as the trainer reads it. Each row is one document, or packed documents of random lengths of
  about `document` tokens."""
  rng, size = np.random.default_rng(0), batch_size * length
  starts = np.arange(0, size, length)
  if document is not None: starts = np.unique(np.append(0, rng.integers(0, size, size // document)))
  tokens = rng.integers(0, spec.vocab_size, size + 1)
  return Rows(Stream(tokens, starts, np.ones(spec.vocab_size, np.int32)), length)[np.arange(batch_size)]


def our_trainer(model, optimizer: AdamW, batch):
  """A function that takes one step of the trainer, including its non-finite guard, and returns the loss before the step."""
  learner = assemble(model, optimizer.build(STEPS), (), jax.random.key(0))
  step, state, batch = compiled_step(learner), initial_state(learner), jax.device_put(batch)
  def call() -> float:
    nonlocal state
    state, metrics = jax.block_until_ready(step(state, learner.loss, batch))
    return metrics['loss'].item()
  return call


def train_step(spec: specs.Transformer, batch, target: float | None = None) -> Case:
  """One optimizer step: AdamW, clipping, warm-up and cosine, ours and, where they are installed, the baselines'."""
  model = new_model(spec, jax.random.key(0))
  optimizer = AdamW(schedule=WarmupCosine(peak=1e-3, warmup=2))
  candidates = {OURS: our_trainer(model, optimizer, batch)}
  if installed(): candidates |= torch_trainers(model, spec, optimizer, batch)
  losses = {name: [call() for _ in range(COMPARED)] for name, call in candidates.items()}
  tokens = batch['inputs_BT'].size
  return Case(candidates=candidates, tokens=tokens, target=target,
              flops=tokens * measure.flops_per_token(model, batch['inputs_BT'].shape[1]).training,
              agreement=_agreement(losses, TOLERANCE[spec.dtype]))


def torch_trainers(model, spec: specs.Transformer, optimizer: AdamW, batch) -> dict[str, Callable[[], float]]:
  """By name, calls that train in PyTorch as `our_trainer` does. A dense model is compared with PyTorch eager, with
  either of two fast implementations of AdamW; a mixture with Mixtral of transformers, its experts in a loop or by grouped
  products ('batched_mm' is left out: it copies a matrix for every token)."""
  from efficient_lm.benches import torch_models
  rates = np.asarray(jax.vmap(optimizer.schedule.build(STEPS))(np.arange(STEPS))).tolist()
  train = functools.partial(torch_models.trainer, batch=batch, optimizer=optimizer, rates=rates)
  found = {}
  if isinstance(spec.stacks[0].mlp, specs.MoE):
    for experts in ('eager', 'grouped_mm'):
      theirs = torch_models.hugging_face(model, spec, experts)
      found[f'transformers Mixtral, {experts} experts'] = train(
        theirs, lambda tokens, theirs=theirs: theirs(input_ids=tokens, use_cache=False).logits, fused=True)
  else:
    for fused in (True, False):
      theirs = torch_models.decoder(model, spec, batch)
      found[f'PyTorch eager, {"fused" if fused else "foreach"} AdamW'] = train(theirs, theirs, fused=fused)
  return found


def _agreement(losses: dict[str, list[float]], tolerance: float) -> str:
  """The largest difference of a baseline's losses, in words; '' without baselines."""
  apart = [difference(f'losses of {COMPARED} steps, {name}', losses[OURS], theirs, tolerance)
           for name, theirs in losses.items() if name != OURS]
  return within(f'losses of {COMPARED} steps', max(apart)) if apart else ''


def wide(quick: bool) -> specs.Transformer:
  """Two layers of width 1024, whose products take most of the time: 26 million parameters."""
  if quick: return little()
  attention = specs.GroupedQuery(num_heads=8, num_kv_heads=4, head_dim=128)
  stack = specs.Stack(num_layers=2, attention=attention, mlp=specs.SwiGLU(hidden=2816), unroll=2)
  return specs.Transformer(vocab_size=320, dim=1024, stacks=(stack,), dtype=dtype())


def prefill(spec: specs.Transformer, length: int, target: float | None = None) -> Case:
  """Reading a prompt into a cache with weights and activations in 8 bits, against the same model in floats. Its logits are
  compared, but not required to agree: the difference is the error of quantization."""
  model = new_model(spec, jax.random.key(0))
  change = lambda _, weight: round_to_nearest(weight, formats.Int(), Rounding(formats.Int()))
  stored = jax.jit(lambda model: rewrite(model, Weight, change))(model)
  prompt_BT = np.random.default_rng(0).integers(0, spec.vocab_size, (1, length)).astype(np.int32)
  prefill = functools.partial(decode.prefill, length=length, vocab_size=spec.vocab_size)
  call = lambda model: lambda: jax.block_until_ready(prefill(model, prompt_BT))[0]
  candidates = {OURS: call(stored), f'ours in {spec.dtype}': call(model)}
  ours, theirs = (np.asarray(candidate()) for candidate in candidates.values())
  apart = np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)
  return Case(candidates=candidates, tokens=length, target=target,
              flops=length * measure.flops_per_token(model, length).forward,
              agreement=f'logits of a model of random weights differ by {apart:.1%}')


def decoding(spec: specs.Transformer, prompt_length: int, num_tokens: int, target=None) -> Case:
  """Greedy decoding of one sequence with a cache, including the prompt."""
  model = new_model(spec, jax.random.key(0))
  prompt_BT = np.random.default_rng(0).integers(0, spec.vocab_size, (1, prompt_length)).astype(np.int32)
  decoder = decode.ready(model)
  def ours():
    greedy = decode.Sampling(temperature=0.0)
    parts = decode.stream(decoder, prompt_BT, num_tokens, sampling=greedy, vocab_size=spec.vocab_size)
    return np.concatenate(list(parts), 1)
  candidates, agreement = {OURS: ours}, ''
  if installed():
    from efficient_lm.benches import torch_models
    theirs = torch_models.generator(torch_models.hugging_face(model, spec), prompt_BT, num_tokens)
    candidates['transformers Llama, generate'] = theirs
    equal = int(np.sum(ours() == theirs()))
    if spec.dtype == 'float32' and equal < num_tokens:
      raise Disagreement(f'greedy decoding: {equal} of {num_tokens} tokens are those of the baseline')
    agreement = f'{equal} of {num_tokens} tokens are the same'
  length = prompt_length + num_tokens
  return Case(candidates=candidates, tokens=num_tokens, target=target, agreement=agreement,
              flops=length * measure.flops_per_token(model, length).forward)
