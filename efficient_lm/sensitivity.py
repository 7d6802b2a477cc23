"""Which weights of a trained model bear few bits, and formats for all under a budget of bytes:

  python -m efficient_lm.sensitivity --run=runs/baseline --budget=400000

  --run=FOLDER      workdir of a training run
  --formats=A,B     of int8, int4, int3, int2, nf4, mxfp8, mxfp4, nvfp4 (default int2,int3,int4,int8)
  --group=N         inputs that share a scale in int8 to int2 and nf4 (default 32)
  --each_layer      each layer by itself (default: all layers of a stack that is run by one loop have one format)
  --where=PATTERN   a regular expression that finds the weights (default: the matrices of the layers)
  --budget=BYTES    of those weights together: prints a plan, rules to be pasted into a config, and what it is worth
  --sequences=N     of training text to measure on (default 32)
"""
import re

from absl import flags

from efficient_lm import commands, formats
from efficient_lm.config import experiment
from efficient_lm.errors import ConfigError, Misfit
from efficient_lm.lazy import lazy

console = lazy('efficient_lm.runs.console')
jax = lazy('jax')
mixed_precision = lazy('efficient_lm.compression.search')
calibration = lazy('efficient_lm.compression.calibration')
rich_progress = lazy('rich.progress')
rich_table = lazy('rich.table')
rules = lazy('efficient_lm.compression.rules')
run = lazy('efficient_lm.runs.run')
train = lazy('efficient_lm.training.trainer')
transformer = lazy('efficient_lm.models.transformer')

FORMATS = {
  'int2': lambda scales: formats.Int(bits=2, symmetric=False, scales=scales),
  'int3': lambda scales: formats.Int(bits=3, scales=scales), 'int4': lambda scales: formats.Int(bits=4, scales=scales),
  'int8': lambda scales: formats.Int(scales=scales), 'nf4': lambda scales: formats.NF4(scales=scales),
  'mxfp8': lambda _: formats.MXFP8(), 'mxfp4': lambda _: formats.MXFP4(), 'nvfp4': lambda _: formats.NVFP4()}

FLAGS = flags.FLAGS
commands.define_run()
flags.DEFINE_list('formats', 'int2,int3,int4,int8', 'to choose from')
flags.DEFINE_integer('group', 32, 'inputs that share a scale')
flags.DEFINE_bool('each_layer', False, 'layers apart')
flags.DEFINE_string('where', None, 'regular expression')
flags.DEFINE_integer('budget', None, 'bytes')
flags.DEFINE_integer('sequences', 32, 'to measure on')


def main(overrides: list[str]):
  """Measures each weight in each format, then, under a budget, a plan beside one format for all."""
  commands.require_run(FLAGS.run)
  choices, where = chosen_formats(), FLAGS.where or rules.LAYERS
  if FLAGS.sequences < 1: raise ConfigError('--sequences', FLAGS.sequences, 'must be at least 1')
  try: re.compile(where)
  except re.error as error: raise ConfigError('--where', where, f'must be a regular expression: {error}') from error
  mesh = run.single_device_mesh()
  with jax.set_mesh(mesh):
    model, batches = run.load_model(FLAGS.run, mesh), batches_of(experiment.read(FLAGS.run), mesh)
    if FLAGS.each_layer: model = transformer.unrolled(model)
    found = measured(model, batches, choices, where)
    print_table(found)
    if FLAGS.budget is not None: print_plan(model, batches, found)


def chosen_formats() -> list:
  """Those that --formats and --group name. Raises ConfigError."""
  unknown = [name for name in FLAGS.formats if name not in FORMATS]
  if unknown or not FLAGS.formats: raise ConfigError('--formats', ','.join(unknown), f'choose from {", ".join(FORMATS)}')
  scales = formats.Group(size=FLAGS.group)
  for _, value, fix in scales.check(): raise ConfigError('--group', value, fix)
  return [FORMATS[name](scales) for name in FLAGS.formats]


def batches_of(trained, mesh) -> list:
  """Training text that follows what the run was trained on."""
  training = trained.train
  corpus = trained.data.open(
    sequence_length=training.sequence_length, batch_size=training.batch_size, seed=trained.seed)
  batches = (train.place(batch, mesh) for batch in corpus.iterate(training.steps))
  return calibration.first_batches(batches, FLAGS.sequences)


def measured(model, batches, choices, where: str) -> list:
  """Sensitivities, with a progress bar. What does not fit a format is one clear line."""
  try: paths = list(mixed_precision.chosen(model, where))
  except Misfit as error: raise ConfigError('--where', where, str(error)) from error
  found = []
  for path in rich_progress.track(paths, 'measuring', console=console.terminal(), transient=True):
    try: found += mixed_precision.sensitivities(model, batches, choices, f'^{re.escape(path)}$')
    except Misfit as error: raise ConfigError('--formats', ','.join(FLAGS.formats), f'{path}: {error}') from error
  return found


def print_table(found):
  """A row for each weight and format."""
  heads = ('weight', 'format', 'bytes', 'SQNR, dB', 'KL, nats a token')
  table = rich_table.Table(*(rich_table.Column(head, justify='left' if i < 2 else 'right') for i, head in enumerate(heads)),
                           box=None, title='each weight by itself', title_justify='left')
  for path in dict.fromkeys(one.path for one in found):
    for i, one in enumerate(one for one in found if one.path == path):
      table.add_row('' if i else path, one.format.name, console.human(one.num_bytes, 'B'), f'{one.sqnr:.1f}',
                    f'{one.divergence:.2e}')
  console.for_tables().print(table)


def print_plan(model, batches, found):
  """The rules, and what they come to beside those of one format for all."""
  try: plan = mixed_precision.choose(found, FLAGS.budget)
  except Misfit as error: raise ConfigError('--budget', FLAGS.budget, str(error)) from error
  table = rich_table.Table('all together', rich_table.Column('bytes', justify='right'),
                           rich_table.Column('KL, nats a token', justify='right'), box=None)
  paths = dict.fromkeys(one.path for one in found)
  uniform = {format.name: tuple(rules.Rule(where=f'^{re.escape(path)}$', weights=format) for path in paths)
             for format in dict.fromkeys(one.format for one in found)}
  for name, rows in {**uniform, 'this plan': plan}.items():
    size, harm = mixed_precision.together(model, batches, rows)
    table.add_row(name, f'{size:,}', f'{harm:.2e}')
  print()
  console.for_tables().print(table)
  if FLAGS.each_layer: print('\nThese rules are for layers apart: stages=(Unroll(), Quantize(rules=…))', end='')
  print(f'\nrules={mixed_precision.pasted(plan)}')


if __name__ == '__main__': commands.start(main, __doc__)
