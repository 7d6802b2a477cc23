"""Times models and operations against baselines that compute the same, in turns, and says how far both results agree.

  python -m efficient_lm.bench [--only=dense_train,decode] [--repeats=10] [--out=runs/bench] [--quick]
  python -m efficient_lm.bench --ops [--only=grouped_matmul,attention/*long*] [--budget=300] [--out=runs/bench]
  python -m efficient_lm.bench --autotune [--only=…] [--budget=300]

Without --ops whole models are timed against PyTorch: CASES
With --ops, each operation is timed by all its implementations and by what one would use without it. With --autotune, tiles
of its kernels are tried, and lines for the tables in ops/*/tiles.py are printed.

  --only=NAME,…   some of the cases; of operations, OP or OP/CASE, where * stands for anything
  --repeats=N     turns of each model, after one to warm up (10); the most turns of an operation (15)
  --budget=S      seconds for all operations (400 on accelerators, 200 on CPU); cases left when they are over are listed
  --out=FOLDER    where bench.txt and bench.json are written, or ops.txt and ops.json, or tuned.json (runs/bench)
  --quick         small sizes, of operations the first case each: shows in a minute or two that everything runs

Baselines of whole models need PyTorch and transformers: pip install efficient_lm[bench]. On a CPU everything is computed in
float32. On a GPU the same cases run in bfloat16, with PyTorch on that GPU; that has not been tried. TPUs have no PyTorch
baselines. Other programs falsify the figures: a thread without a core of its own delays all threads that wait for it.
"""
import datetime
import functools
import importlib.metadata
import importlib.util
import os

from absl import flags

from efficient_lm import commands
from efficient_lm.benches import result
from efficient_lm.errors import ConfigError
from efficient_lm.runs import ledger

# The help text and errors must answer before JAX is loaded: what measures is imported where the measuring begins.
FLAGS = flags.FLAGS
flags.DEFINE_list('only', [], 'names of cases')
flags.DEFINE_integer('repeats', None, 'turns of each case')
commands.define_out()
flags.DEFINE_bool('quick', False, 'small sizes')
flags.DEFINE_bool('ops', False, 'time operations instead of models')
flags.DEFINE_bool('autotune', False, 'try tiles of kernels instead')
flags.DEFINE_float('budget', None, 'seconds for all operations')


def batch_shape(quick: bool) -> tuple[int, int]:
  """Sequences and tokens of each."""
  return (2, 64) if quick else (8, 256)


def dense_train(quick: bool, document: int | None = None) -> result.Case:
  """The train step of a dense model against PyTorch."""
  from efficient_lm.benches import models
  spec = models.little() if quick else models.ten_million()
  return models.train_step(spec, models.random_batch(spec, *batch_shape(quick), document), target=1.0)


def moe_train(quick: bool) -> result.Case:
  """The train step of a mixture of experts against transformers."""
  from efficient_lm.benches import models
  spec = models.little(models.mixture(4, 64)) if quick else models.ten_million(models.mixture(8, 512), 2)
  return models.train_step(spec, models.random_batch(spec, *batch_shape(quick)), target=2.0)


def decoding(quick: bool) -> result.Case:
  """Cached greedy decoding against transformers."""
  from efficient_lm.benches import models
  if quick: return models.decoding(models.little(), 8, 16)
  return models.decoding(models.ten_million(), 32, 128, target=3.0)


def prefill_int8(quick: bool) -> result.Case:
  """Reading a prompt with weights and activations in 8 bits against the same model in floats."""
  from efficient_lm.benches import models
  return models.prefill(models.wide(quick), 64 if quick else 512, target=1.3)


def prefill_blocks(quick: bool, sparsity: float, target: float) -> result.Case:
  """Reading a prompt with block-sparse weights against the same numbers in whole matrices."""
  from efficient_lm.benches import blocks
  return blocks.prefill(quick, sparsity, target)


def prefill_narrow(quick: bool, share: float, target: float) -> result.Case:
  """Reading a prompt with a share of a model's width against all of it."""
  from efficient_lm.benches import blocks
  return blocks.narrow(quick, share, target)


def decode_few_bits(quick: bool, name: str, batch: int, num_experts: int | None = None) -> result.Case:
  """Decoding with weights in few bits against the same model in floats."""
  from efficient_lm.benches import few_bits
  spec = few_bits.smol(quick) if num_experts is None else few_bits.experts(num_experts, quick)
  return few_bits.decoding(spec, name, batch, target=1.5 if batch > 1 or num_experts else 2.0)


def importing(quick: bool) -> result.Case:
  """Reading a checkpoint of Hugging Face, against safetensors.torch."""
  from efficient_lm.benches import loading
  return loading.importing(quick, target=0.5)


# Name -> the case, at full or small size.
CASES = {
  'dense_train': dense_train,
  'dense_train_packed': lambda quick: dense_train(quick, document=20 if quick else 100),
  'moe_train': moe_train,
  'decode': decoding,
  'prefill_int8': prefill_int8,
  'prefill_blocks_75': functools.partial(prefill_blocks, sparsity=0.75, target=1.8),
  'prefill_blocks_90': functools.partial(prefill_blocks, sparsity=0.9, target=5.0),
  'prefill_half_width': functools.partial(prefill_narrow, share=0.5, target=1.8),
  **{f'decode_{name}_{batch}': functools.partial(decode_few_bits, name=name, batch=batch)
     for name in ('int8', 'int4') for batch in (1, 8)},
  **{f'decode_int4_{count}_experts': functools.partial(decode_few_bits, name='int4', batch=1, num_experts=count)
     for count in (8, 32, 128)},
  'import': importing,
}


def check(only: list[str], repeats: int | None, of_models: bool = True):
  """Raises ConfigError for wrong flags, before JAX is loaded."""
  for name in only:
    if of_models and name not in CASES: raise ConfigError('--only', name, f'choose from {", ".join(CASES)}; or add --ops')
  if repeats is not None and repeats < 1: raise ConfigError('--repeats', repeats, 'must be at least 1')


def versions() -> dict[str, str]:
  """Versions of the packages that the ledger names, and of the baselines that are installed."""
  baselines = {name for name in ('torch', 'transformers', 'tokamax') if importlib.util.find_spec(name)}
  return ledger.versions() | {name: importlib.metadata.version(name) for name in sorted(baselines)}


def show(terminal, page, width: int):
  """Prints a page; in a file or a pipe, `width` characters wide, so that all columns fit."""
  if not terminal.is_terminal: terminal.width = width
  terminal.print(page)


def today() -> str:
  """The date in UTC: '2000-01-31'."""
  return datetime.datetime.now(datetime.UTC).strftime('%Y-%m-%d')


def measure_all(names: list[str], repeats: int, quick: bool, terminal) -> result.Report:
  """Runs the cases of models one after another and prints a line as each is done."""
  import jax

  from efficient_lm.benches import ceilings, models
  load, rows = os.getloadavg()[0], []
  precision = models.dtype()
  best = ceilings.measured({precision}, quick)
  for name in names:
    with terminal.status(f'{name}: building') as status:
      row = result.measured(name, CASES[name](quick), repeats, lambda text: status.update(f'{name}: {text}'))
    beside = f', {row.ratio:.2f} times as fast as {row.baseline}' if row.baseline else f'; {result.MISSING}'
    terminal.print(f'{name}: {ledger.duration(row.ours)}{beside}', soft_wrap=True, markup=False)
    rows.append(row)
    jax.clear_caches()
  best = best.best(ceilings.measured({precision}, quick))   # again: the machine may have been busy before
  return result.Report(hardware=ledger.hardware(), load=load, versions=versions(), date=today(),
                       peak_flops=best.flops[precision], quick=quick, rows=rows)


def measure_ops(work: list, repeats: int, budget: float, quick: bool, terminal):
  """Runs cases of operations and returns an `op_report.Report`; what is known so far is written after each case."""
  from efficient_lm.benches import ceilings, op_report, op_speed, ops
  from efficient_lm.ops import dispatch
  load, rows = os.getloadavg()[0], []
  precisions = {case.precision for _, _, case in work}
  best = ceilings.measured(precisions, quick)
  def report(left_out=()):
    return op_report.Report(
      hardware=ledger.hardware(), load=load, versions=versions(), date=today(), ceilings=best, rows=rows,
      elsewhere=ops.elsewhere({op.name: op for op, _, _ in work}, dispatch.device()), left_out=list(left_out))
  def done(row):
    rows.append(row)
    times = ', '.join(f'{one.name} {ledger.duration(one.median)}' for one in row.timings)
    terminal.print(f'{row.op}, {row.case}: {times or row.notes}', soft_wrap=True, markup=False)
    op_report.write(report(), out_folder())
  left_out = op_speed.run(work, budget, done, repeats)
  if op_speed.alive(): best = best.best(ceilings.measured(precisions, quick))
  return report(left_out)


def operations(terminal):
  """Times or tunes operations, prints and writes; exits with an error if an implementation failed or its result is wrong."""
  import jax

  from efficient_lm.benches import op_report, op_speed, tuning
  budget = FLAGS.budget or (200 if jax.default_backend() == 'cpu' else 400)
  work = op_speed.select(FLAGS.only, FLAGS.quick)
  if FLAGS.autotune:
    found = tuning.run(work, budget, lambda line: terminal.print(line, soft_wrap=True, markup=False))
    return terminal.print(f'{tuning.write(found, out_folder())}')
  report = measure_ops(work, FLAGS.repeats or op_speed.ROUNDS, budget, FLAGS.quick, terminal)
  show(terminal, op_report.page(report), op_report.WIDTH)
  terminal.print(f'{op_report.write(report, out_folder())}')
  if report.wrong: raise SystemExit(f'{len(report.wrong)} results are not as they should be: see WRONG above')


def out_folder() -> str:
  """Where what was measured is kept."""
  return FLAGS.out or os.path.join('runs', 'bench')


def main(overrides: list[str]):
  """Measures, prints and writes."""
  of_models = not (FLAGS.ops or FLAGS.autotune)
  check(FLAGS.only, FLAGS.repeats, of_models)
  os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')   # PyTorch needs memory of the same GPU
  from efficient_lm.runs import console
  terminal = console.terminal()
  if not of_models: return operations(terminal)
  report = measure_all(FLAGS.only or list(CASES), FLAGS.repeats or 10, FLAGS.quick, terminal)
  show(terminal, result.page(report), result.WIDTH)
  terminal.print(f'{result.write(report, out_folder())}')


if __name__ == '__main__': commands.start(main, __doc__.replace('CASES', ', '.join(CASES)))
