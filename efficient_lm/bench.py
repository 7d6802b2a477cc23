"""Times what matters against baselines that compute the same, in turns, and says how far both agree.

  python -m efficient_lm.bench [--only=dense_train,decode] [--repeats=10] [--out=runs/bench] [--quick]

  --only=NAME,…   some of: CASES
  --repeats=N     turns of each case, after one to warm up (10)
  --out=FOLDER    where bench.txt and bench.json go (runs/bench)
  --quick         small sizes: shows in a minute or two that everything runs

Baselines of whole models need PyTorch and transformers: pip install efficient_lm[bench]. On a CPU all is
float32. On a GPU the same cases run in bfloat16, with PyTorch on that GPU; that has not been tried. TPUs have
no PyTorch baselines. Other programs falsify the figures: a thread without a core holds up its whole team.
"""
import datetime
import importlib.metadata
import importlib.util
import os

from absl import flags

from efficient_lm import commands
from efficient_lm.benches import result
from efficient_lm.errors import ConfigError
from efficient_lm.lazy import lazy

console = lazy('efficient_lm.console')
jax = lazy('jax')
ledger = lazy('efficient_lm.ledger')
models = lazy('efficient_lm.benches.models')
ops = lazy('efficient_lm.benches.ops')

FLAGS = flags.FLAGS
flags.DEFINE_list('only', [], 'names of cases')
flags.DEFINE_integer('repeats', 10, 'turns of each case')
flags.DEFINE_string('out', os.path.join('runs', 'bench'), 'folder for bench.txt and bench.json')
flags.DEFINE_bool('quick', False, 'small sizes')


def batch_shape(quick: bool) -> tuple[int, int]:
  """Sequences and tokens of each."""
  return (2, 64) if quick else (8, 256)


def dense_train(quick: bool, document: int | None = None) -> result.Case:
  """The dense train step against PyTorch."""
  spec = models.little() if quick else models.ten_million()
  return models.train_step(spec, models.random_batch(spec, *batch_shape(quick), document), target=1.0)


def moe_train(quick: bool) -> result.Case:
  """The mixture-of-experts train step against transformers."""
  spec = models.little(models.mixture(4, 64)) if quick else models.ten_million(models.mixture(8, 512), 2)
  return models.train_step(spec, models.random_batch(spec, *batch_shape(quick)), target=2.0)


def decoding(quick: bool) -> result.Case:
  """Cached greedy decoding against transformers."""
  if quick: return models.decoding(models.little(), 8, 16)
  return models.decoding(models.ten_million(), 32, 128, target=3.0)


def grouped_matmul(quick: bool, skew: float = 0.0) -> result.Case:
  """Grouped product against lax.ragged_dot."""
  return ops.grouped_matmul(*((8, 256, 32, 64) if quick else (64, 4096, 256, 512)), skew=skew, target=10.0)


def attention(quick: bool) -> result.Case:
  """Attention against its reference."""
  return ops.attention(*((2, 64, 4, 2, 16) if quick else (8, 256, 6, 6, 64)), documents=1)


def attention_long(quick: bool) -> result.Case:
  """Attention over a long sequence against its reference."""
  return ops.attention(*((1, 128, 4, 2, 16) if quick else (1, 2048, 6, 2, 64)), documents=4)


def linear_cross_entropy(quick: bool) -> result.Case:
  """Fused loss against its reference."""
  return ops.linear_cross_entropy(*((128, 32, 512) if quick else (2048, 384, 32_000)))


# Name -> the case, at full or small size.
CASES = {
  'dense_train': dense_train,
  'dense_train_packed': lambda quick: dense_train(quick, document=20 if quick else 100),
  'moe_train': moe_train,
  'decode': decoding,
  'grouped_matmul': grouped_matmul,
  'grouped_matmul_skewed': lambda quick: grouped_matmul(quick, skew=1.5),
  'attention': attention,
  'attention_long': attention_long,
  'linear_cross_entropy': linear_cross_entropy,
}


def check(only: list[str], repeats: int):
  """Raises ConfigError before anything heavy is loaded."""
  for name in only:
    if name not in CASES: raise ConfigError('--only', name, f'choose from {", ".join(CASES)}')
  if repeats < 1: raise ConfigError('--repeats', repeats, 'must be at least 1')


def versions() -> dict[str, str]:
  """Those of the ledger, and of the baselines where they are installed."""
  baselines = {name for name in ('torch', 'transformers') if importlib.util.find_spec(name)}
  return ledger.versions() | {name: importlib.metadata.version(name) for name in sorted(baselines)}


def measure_all(names: list[str], repeats: int, quick: bool, terminal) -> result.Report:
  """Runs the cases one after the other; a line each as they are done."""
  load = os.getloadavg()[0]
  large = 512 if quick else 2048 if jax.default_backend() == 'cpu' else 8192
  peaks, rows = [ops.peak_matmul(large)], []
  for name in names:
    with terminal.status(f'{name}: building') as status:
      row = result.measured(name, CASES[name](quick), repeats, lambda text: status.update(f'{name}: {text}'))
    beside = f', {row.ratio:.2f} times as fast as {row.baseline}' if row.baseline else f'; {result.MISSING}'
    terminal.print(f'{name}: {ledger.duration(row.ours)}{beside}', soft_wrap=True, markup=False)
    rows.append(row)
    jax.clear_caches()
  peaks.append(ops.peak_matmul(large))   # again: the machine may have been busy before
  date = datetime.datetime.now(datetime.UTC).strftime('%Y-%m-%d')
  return result.Report(hardware=ledger.hardware(), load=load, versions=versions(), date=date,
                       peak_flops=max(peaks), quick=quick, rows=rows)


def main(overrides: list[str]):
  """Measures, prints and writes."""
  check(FLAGS.only, FLAGS.repeats)
  os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')   # PyTorch needs memory of the same GPU
  terminal = console.terminal()
  report = measure_all(FLAGS.only or list(CASES), FLAGS.repeats, FLAGS.quick, terminal)
  # In a file or a pipe there is room for all columns.
  terminal.print(result.page(report), width=None if terminal.is_terminal else result.WIDTH)
  terminal.print(f'{result.write(report, FLAGS.out)}')


if __name__ == '__main__': commands.start(main, __doc__.replace('CASES', ', '.join(CASES)))
