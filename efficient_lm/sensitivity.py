"""Which weights of a trained model bear few bits, and formats for all under a budget of bytes:

  python -m efficient_lm.sensitivity --run=runs/baseline --budget=400000

  --run=FOLDER      workdir of a training run, or a Hugging Face folder
  --stage=N         the model of stage number N instead of that of the last
  --packed          matrices of a GGUF file stay in the few bits that it stores
  --formats=A,B     of int8, int4, int3, int2, nf4, mxfp8, mxfp4, nvfp4 (default int2,int3,int4,int8)
  --group=N         inputs that share a scale in int8 to int2 and nf4 (default 32), or fewer where N does not divide
  --each_layer      each layer by itself (default: all layers of a stack that is run by one loop have one format)
  --where=PATTERN   a regular expression that finds the weights (default: the matrices of the layers)
  --budget=BYTES    of those weights together: prints a plan, rules to be pasted into a config, and its divergence
  --text=FILE       any text file to measure on (default: the training text of the run; a Hugging Face folder has none)
  --sequences=N     of that text (default 32)
  --config=FILE     a config file whose own classes the run was made with
"""
import itertools
import re

from absl import flags

from efficient_lm import commands, formats
from efficient_lm.compression import rules
from efficient_lm.errors import ConfigError, IncompatibleError

FORMATS = {
  'int2': lambda scales: formats.Int(bits=2, symmetric=False, scales=scales),
  'int3': lambda scales: formats.Int(bits=3, scales=scales), 'int4': lambda scales: formats.Int(bits=4, scales=scales),
  'int8': lambda scales: formats.Int(scales=scales), 'nf4': lambda scales: formats.NF4(scales=scales),
  'mxfp8': lambda _: formats.MXFP8(), 'mxfp4': lambda _: formats.MXFP4(), 'nvfp4': lambda _: formats.NVFP4()}

FLAGS = flags.FLAGS
commands.define_run()
commands.define_text()
flags.DEFINE_list('formats', 'int2,int3,int4,int8', 'to choose from')
flags.DEFINE_integer('group', 32, 'inputs that share a scale')
flags.DEFINE_bool('each_layer', False, 'layers apart')
flags.DEFINE_string('where', None, 'regular expression')
flags.DEFINE_integer('budget', None, 'bytes')
flags.DEFINE_integer('sequences', 32, 'to measure on')


def main(overrides: list[str]):
  """Measures each weight in each format, then, under a budget, a plan beside one format for all."""
  source = commands.run_source()
  commands.check_text(source)
  choices, where = chosen_formats(), FLAGS.where or rules.LAYERS
  if FLAGS.sequences < 1: raise ConfigError('--sequences', FLAGS.sequences, 'must be at least 1')
  try: re.compile(where)
  except re.error as error: raise ConfigError('--where', where, f'must be a regular expression: {error}') from error
  import jax

  from efficient_lm.models.transformer import unrolled
  from efficient_lm.parallel.sharding import single_device_mesh
  mesh = single_device_mesh()
  with jax.set_mesh(mesh):
    model, batches = source.load(mesh), batches_of(source, mesh)
    if FLAGS.each_layer: model = unrolled(model)
    found = measured(model, batches, choices, where)
    print_table(found, choices)
    if FLAGS.budget is not None: print_plan(model, batches, found, choices)


def chosen_formats() -> list:
  """Those that --formats and --group name. Raises ConfigError."""
  unknown = [name for name in FLAGS.formats if name not in FORMATS]
  if unknown or not FLAGS.formats: raise ConfigError('--formats', ','.join(unknown), f'choose from {", ".join(FORMATS)}')
  scales = formats.Group(size=FLAGS.group)
  for _, value, fix in scales.check(): raise ConfigError('--group', value, fix)
  return [FORMATS[name](scales) for name in FLAGS.formats]


def batches_of(source, mesh) -> list:
  """The file --text, or training text that follows what the run was trained on."""
  from efficient_lm.compression.calibration import first_batches
  from efficient_lm.parallel.sharding import place
  if FLAGS.text is not None:
    return first_batches((place(batch, mesh) for batch in commands.text_batches(source)), FLAGS.sequences)
  trained, _, length = commands.trained_as(source)
  corpus = trained.data.open(seed=trained.seed, tokenizer=source.tokenizer())
  batches = corpus.batches(batch_size=trained.train.batch_size, sequence_length=length)
  return first_batches((place(batch, mesh) for batch in batches.iterate(trained.train.steps)), FLAGS.sequences)


def measured(model, batches, choices, where: str) -> list:
  """Sensitivities, with a progress bar. What does not fit a format is one clear line."""
  import rich.progress

  from efficient_lm.compression import search
  from efficient_lm.runs import console
  try: paths = list(search.chosen(model, where))
  except IncompatibleError as error: raise ConfigError('--where', where, str(error)) from error
  found = []
  for path in rich.progress.track(paths, 'measuring', console=console.terminal(), transient=True):
    try: found += search.sensitivities(model, batches, choices, f'^{re.escape(path)}$')
    except IncompatibleError as error: raise ConfigError('--formats', ','.join(FLAGS.formats), f'{path}: {error}') from error
  return found


def print_table(found, choices):
  """A row for each weight and format, and what was fitted to weights that groups do not divide."""
  import rich.table

  from efficient_lm.compression import rewriting
  from efficient_lm.runs import console
  heads = ('weight', 'format', 'bytes', 'SQNR, dB', 'KL, nats a token')
  table = rich.table.Table(*(rich.table.Column(head, justify='left' if i < 2 else 'right') for i, head in enumerate(heads)),
                           box=None, title='each weight by itself', title_justify='left')
  for path in dict.fromkeys(one.path for one in found):
    for i, one in enumerate(one for one in found if one.path == path):
      table.add_row('' if i else path, one.format.name, console.human(one.num_bytes, 'B'), f'{one.sqnr:.1f}',
                    f'{one.divergence:.2e}')
  console.for_tables().print(table)
  fitted = ((one.path, asked, one.format) for one, asked in zip(found, itertools.cycle(choices)))
  for note in rewriting.replaced(fitted): print(note)


def print_plan(model, batches, found, choices):
  """The rules, and what they come to beside those of one format for all."""
  import rich.table

  from efficient_lm.compression import search
  from efficient_lm.runs import console
  try: plan = search.choose(found, FLAGS.budget)
  except IncompatibleError as error: raise ConfigError('--budget', FLAGS.budget, str(error)) from error
  table = rich.table.Table('all together', rich.table.Column('bytes', justify='right'),
                           rich.table.Column('KL, nats a token', justify='right'), box=None)
  paths = dict.fromkeys(one.path for one in found)
  uniform = {format.name: tuple(rules.Rule(where=f'^{re.escape(path)}$', weights=format) for path in paths)
             for format in choices}
  for name, rows in {**uniform, 'this plan': plan}.items():
    size, harm = search.together(model, batches, rows)
    table.add_row(name, f'{size:,}', f'{harm:.2e}')
  print()
  console.for_tables().print(table)
  if FLAGS.each_layer: print('\nThese rules are for layers apart: stages=(Unroll(), Quantize(rules=…))', end='')
  print(f'\nrules={search.pasted(plan)}')


if __name__ == '__main__': commands.start(main, __doc__)
