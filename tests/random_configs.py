"""Hypothesis strategies for whole experiments: models, optimizers, techniques and stages in any order, small enough to run.

What a draw asks for is nearly always possible; now and then a stage stands where it cannot, and has to be refused."""
import dataclasses

from hypothesis import strategies as st

from efficient_lm.config import Experiment, Train, Training
from efficient_lm.data import BPE, Corpus, Markov, TextFiles
from efficient_lm.formats import MXFP4, NF4, Affine, Channel, Float8, FullRangeInt, Group, Int, MidRise, Tensor, Ternary
from efficient_lm.interop.export import Export
from efficient_lm.models import spec
from efficient_lm.models.moe import routing
from efficient_lm.runs import FromRun
from efficient_lm.techniques import (
  Awq,
  BitNet,
  Blocks,
  Convert,
  Distill,
  Erk,
  GivingUp,
  Gptq,
  LearnedClip,
  LearnedSteps,
  Lora,
  LowPrecisionTraining,
  Magnitude,
  Merge,
  NofM,
  Pack,
  PerOutput,
  Prune,
  PruneOnce,
  QuantAware,
  Quantize,
  Random,
  RigL,
  Rotate,
  RoundToNearest,
  Rule,
  SkipSpikes,
  SmoothQuant,
  Snip,
  SparseGpt,
  SparseTraining,
  StaticMask,
  StraightThroughMask,
  StretchedLevels,
  Taylor,
  Uniform,
  Unroll,
  Upcycle,
  Wanda,
)
from efficient_lm.training.optimizers import AdamW, Muon, WarmupCosine, WarmupStableDecay

DIM, HIDDEN, LENGTH, BATCH = 32, 64, 16, 4
LANGUAGE = Markov(alphabet=8, order=1, document_length=24, train_documents=32, heldout_documents=8)
one_of = st.sampled_from

# ------------------------------------------------------------------ models

ATTENTION = st.one_of(
  st.builds(spec.GroupedQuery, num_heads=st.just(4), num_kv_heads=one_of((1, 2, 4)), head_dim=st.just(8),
            qk_norm=one_of(('', 'H', 'NH')), window=one_of((None, 5)), softcap=one_of((None, 20.0)),
            biases=one_of(((), ('query', 'key', 'value'), ('output',)))),
  st.builds(spec.Latent, num_heads=st.just(2), query_rank=one_of((None, 16)), kv_rank=st.just(16), nope_dim=st.just(8),
            rope_dim=st.just(8), value_dim=st.just(8)))
BALANCE = one_of(((), (routing.LoadBalance(),), (routing.LoadBalance(), routing.RouterZ()), (routing.LossFreeBias(),)))
CHOICE = one_of((routing.SoftmaxTopK(top_k=1), routing.SoftmaxTopK(top_k=2, normalize=False),
                 routing.SigmoidTopK(top_k=2, num_groups=2, top_groups=1, scale=2.5)))
DENSE = st.one_of(
  st.just(spec.SwiGLU(hidden=HIDDEN)),
  st.builds(spec.Gated, hidden=st.just(HIDDEN), activation=one_of(spec.ACTIVATIONS), biases=one_of(((), ('down',)))),
  st.builds(spec.Plain, hidden=st.just(HIDDEN), activation=one_of(spec.ACTIVATIONS)))
MIXTURE = st.one_of(
  st.builds(spec.MoE, num_experts=st.just(4), hidden=st.just(32), router=CHOICE, balance=BALANCE,
            capacity=one_of((None, 1.5)), num_shared=one_of((0, 1))),
  st.just(spec.MoE(num_experts=4, hidden=32, router=routing.ExpertChoice(capacity=1.0), balance=())),
  st.just(spec.MoE(num_experts=4, hidden=32, shared=spec.SigmoidGated(inner=spec.SwiGLU(hidden=32)))))
BLOCK = one_of((spec.PreNorm(), spec.PostNorm(), spec.SandwichNorm()))
LAYER = st.builds(spec.Layer, attention=ATTENTION, mlp=st.one_of(DENSE, MIXTURE))
STACK = st.one_of(
  st.builds(spec.Stack, num_layers=one_of((1, 2)), attention=ATTENTION, mlp=st.one_of(DENSE, MIXTURE),
            unroll=one_of((1, 2)), remat=one_of(spec.REMAT), block=BLOCK),
  st.builds(spec.Repeated, num_repeats=one_of((1, 2)), layers=st.tuples(LAYER, LAYER), remat=one_of(spec.REMAT),
            block=BLOCK))


def models(vocab_size: int):
  ends = st.builds(spec.Ends, positions=one_of((None, spec.Learned(length=64))), embed_scale=one_of((1.0, 5.0)),
                   softcap=one_of((None, None, 30.0)))
  return st.builds(spec.Transformer, vocab_size=st.just(vocab_size), dim=st.just(DIM),
                   stacks=st.one_of(st.tuples(STACK), st.tuples(STACK), st.tuples(STACK, STACK)), tied=st.booleans(),
                   dtype=one_of(spec.DTYPES), norm=one_of((spec.RMS(), spec.LayerNorm())), ends=ends)


# ------------------------------------------------------------------ trainings

SCHEDULE = st.one_of(st.builds(WarmupCosine, peak=one_of((1e-4, 1e-2)), warmup=one_of((0, 1))),
                     st.builds(WarmupStableDecay, warmup=one_of((0, 1)), decay=one_of((0.0, 0.5))))
CLIP = one_of((1.0, float('inf')))
OPTIMIZER = st.one_of(
  st.builds(AdamW, schedule=SCHEDULE, clip=CLIP, state_bits=one_of((32, 8)), decay_until=one_of((1.0, 0.5))),
  st.builds(Muon, schedule=SCHEDULE, clip=CLIP))
TRAINING = st.builds(Training, steps=st.just(2), batch_size=st.just(BATCH), sequence_length=st.just(LENGTH),
                     optimizer=OPTIMIZER, accumulate=one_of((1, 2)), log_every=st.just(1), eval_every=one_of((1, 2)),
                     checkpoint_every=one_of((1, 2)))

WEIGHTS = one_of((Int(), Int(bits=4, scales=Group(size=8)), Int(bits=3, scales=Channel(), symmetric=False), Affine(),
                  FullRangeInt(), MidRise(), Ternary(), NF4(scales=Group(size=16)), MXFP4(), Float8()))
PLAIN_RULE = st.builds(Rule, weights=WEIGHTS, activations=one_of((None, Int())))
LEARNED = one_of((LearnedSteps(), LearnedSteps(range=None)))
QAT = st.one_of(
  st.builds(QuantAware, rules=st.tuples(PLAIN_RULE), start=one_of((0, 1))),
  st.builds(QuantAware, rules=st.just((Rule(weights=Int(bits=4), activations=Int(scales=Tensor())),)), method=LEARNED,
            activation_method=one_of((LearnedSteps(), LearnedClip()))),
  st.just(QuantAware(rules=(Rule(weights=MidRise()),), method=StretchedLevels())),
  st.just(BitNet()))
PRUNE = st.builds(Prune, sparsity=one_of((0.25, 0.5)), start=st.just(0), end=one_of((None, 1, 2)), every=st.just(1))
LOW_PRECISION = st.builds(LowPrecisionTraining, forward=one_of(('int8', 'float8_e4m3fn', None)),
                          dgrad=one_of(('int8', 'float8_e5m2')), stochastic=st.booleans())
SPARSE = st.one_of(
  st.just(SparseTraining(sparsity=0.5, method=RigL(every=1, end=2), allocation=Erk())),
  st.just(SparseTraining(sparsity=0.25, method=StaticMask())),
  st.just(SparseTraining(sparsity=0.5, method=StraightThroughMask(start=0, end=2, every=1), pattern=NofM())))
LORA = st.builds(Lora, rank=one_of((1, 4)), where=one_of(('mlp', 'stacks')))
SKIP = st.builds(SkipSpikes, window=one_of((2, 8)))
UPCYCLE = st.builds(Upcycle, num_experts=one_of((2, 4)), balance=BALANCE)


@dataclasses.dataclass
class Known:
  """Of what a stage is given: whether all is float ('float'), some fake-quantized ('fake') or stored ('stored'); whether it
  has zeros that are promised, adapters, dense layers, a cap on its logits."""
  kind: str = 'float'
  pruned: bool = False
  adapted: bool = False
  dense: bool = True
  capped: bool = False


@st.composite
def techniques(draw, known: Known, teacher):
  """A selection in any order, each at most once; changes `known`."""
  choices = {'skip': SKIP, 'lowered': LOW_PRECISION}
  if known.kind == 'float' and not known.adapted:
    choices['qat'] = QAT
    # Each has the weights to itself.
    zeros = draw(one_of(('prune', 'prune' if known.pruned else 'sparse', 'lora')))
    choices[zeros] = {'prune': PRUNE, 'sparse': SPARSE, 'lora': LORA}[zeros]
    if known.dense and zeros != 'lora': choices['upcycle'] = UPCYCLE
  if teacher is not None and not known.capped:
    choices['distill'] = st.builds(Distill, teacher=st.just(teacher), weight=one_of((0.0, 0.5, 1.0)),
                                   temperature=one_of((1.0, 2.0)))
  names = draw(st.lists(one_of(sorted(choices)), unique=True, max_size=4))
  known.pruned |= bool({'prune', 'sparse'} & set(names))
  known.adapted |= 'lora' in names
  known.dense &= 'upcycle' not in names
  if 'qat' in names: known.kind = 'fake'
  return tuple(draw(choices[name]) for name in names)


# ------------------------------------------------------------------ stages

METHOD = one_of((RoundToNearest(), RoundToNearest(), Gptq(block=16), Awq(grid=3, clips=2)))
EXPORT = st.just(Export())
CALIBRATED = dict(sequences=st.just(4), least_tokens=st.just(1))
ONCE = st.one_of(
  st.builds(PruneOnce, sparsity=st.just(0.5), score=one_of((Magnitude(), Random(), Wanda(), SparseGpt(), Snip(), Taylor())),
            **CALIBRATED),
  st.builds(PruneOnce, pattern=st.just(NofM()), score=one_of((Magnitude(), Wanda(), SparseGpt())), **CALIBRATED),
  st.builds(PruneOnce, sparsity=st.just(0.5), pattern=one_of((PerOutput(), Blocks(outputs=8, inputs=8))),
            allocation=one_of((Uniform(), Erk()))))


@st.composite
def stage(draw, known: Known, teacher):
  """One that suits what is known, or, in one of twelve, any; changes `known`."""
  suits = {'float': ('train', 'once', 'quantize', 'rotate', 'smooth', 'unroll'), 'fake': ('train', 'convert'),
           'stored': ('rest',)}
  if known.kind == 'float' and known.pruned: suits['float'] += ('pack',)
  if known.adapted: suits = dict.fromkeys(suits, ('merge',))
  # Few of these models are ones that other engines know.
  every = sorted({'export', *(name for names in suits.values() for name in names)})
  name = draw(one_of(every if draw(st.integers(0, 11)) == 11 else suits[known.kind]))
  before = dataclasses.replace(known)
  if name == 'once': known.pruned = True
  if name == 'merge': known.adapted = False
  if name in ('quantize', 'convert', 'rest', 'pack'): known.kind = 'stored'
  if name == 'train': return Train(training=draw(TRAINING), techniques=draw(techniques(known, teacher)))
  rotate = st.builds(Rotate, residual=one_of((1, 32)), values=one_of((1, 4096)), hidden=one_of((1, 32)))
  made = draw({
    'once': ONCE, 'pack': st.just(Pack()), 'merge': st.just(Merge()),
    'quantize': st.builds(Quantize, rules=st.tuples(PLAIN_RULE), method=METHOD, sequences=st.just(4),
                          least_tokens=st.just(1),
                          before=st.just(()) if before.pruned else one_of(((), (), (SmoothQuant(sequences=4), Rotate())))),
    'rotate': rotate, 'smooth': st.just(SmoothQuant(sequences=4)), 'unroll': st.just(Unroll()),
    'convert': st.just(Convert()),
    'rest': st.just(Quantize(rules=(Rule(where='embed|own_head', weights=Int()),))), 'export': EXPORT}[name])
  return GivingUp(stage=made, lost=('zeros', 'pattern')) if name == 'rotate' and before.pruned else made


@st.composite
def experiments(draw, base: str, text: str):
  """base: the workdir of a run over LANGUAGE, to start from and to learn from; text: a pattern of files."""
  by_bytes = Corpus(source=TextFiles(train=(text,), heldout_fraction=0.3), eval_tokens=64)
  synthetic = Corpus(source=LANGUAGE, eval_tokens=64)
  data, vocab_size = draw(one_of(((synthetic, 8), (synthetic, 8), (by_bytes, 264),
                                  (dataclasses.replace(by_bytes, tokenizer=BPE(vocab_size=270)), 288))))
  own = FromRun(path=base) if data is synthetic else None
  start = own if own is not None and draw(st.integers(0, 3)) == 3 else None
  model = draw(models(vocab_size)) if start is None else None
  known = Known() if model is None else Known(capped=model.ends.softcap is not None, dense=any(
    not isinstance(layer.mlp, spec.MoE) for layer in model.layers))
  first = draw(techniques(known, own))
  stages = []
  for _ in range(draw(one_of((0, 1, 2, 3)))): stages.append(draw(stage(known, own)))
  return Experiment(seed=draw(one_of((0, 7))), model=model, start=start, data=data, train=draw(TRAINING), techniques=first,
                    stages=tuple(stages))
