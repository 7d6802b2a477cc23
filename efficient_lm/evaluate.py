"""Bits per byte and perplexity of a trained model on any text, and how far it is from another one:

  python -m efficient_lm.evaluate --run=runs/moe [--text=FILE] [--reference=FOLDER] [--cache=FORMAT]

  --run=FOLDER        workdir of a training run, a Hugging Face folder, or a GGUF file
  --stage=N           the model of stage number N instead of that of the last
  --packed            matrices of a GGUF file stay in the few bits that it stores
  --text=FILE         any text file, or a .npy file with rows of token ids (default: the held-out text of the run; models of
                      others have none)
  --limit=N           only the first N tokens
  --window=N          tokens that the model reads at once (default: as it was trained; of models of others, their context,
                      1024 at most). transformers counts the last target too: its max_length of 1024 is 1023 here
  --stride=N          windows begin N tokens apart, and only what none before has predicted counts (default: the window, so
                      that they stand side by side). A small one gives each token a long context and takes long
  --noend             the mark that ends --text is not predicted, as other tools measure
  --reference=FOLDER  a model with the same vocabulary, such as the one in float that this was made of: adds the mean of
                      KL(reference || model), and the share of tokens at which both find the same token the likeliest
  --cache=FORMAT      read token by token, as generation does, through a cache in float, int8 or int4, each window as one
                      text (default: windows at once, documents apart)
  --cache_group=N     tokens that share a scale (default: 1 in int8, 32 in int4)
  --json              prints one line of JSON instead of a sentence
  --config=FILE       a config file whose own classes the run was made with
"""
import functools
import json

from absl import flags

from efficient_lm import commands
from efficient_lm.errors import ConfigError

FLAGS = flags.FLAGS
commands.define_run()
commands.define_text()
commands.define_cache()
flags.DEFINE_integer('limit', None, 'tokens')
flags.DEFINE_integer('window', None, 'tokens that are read at once')
flags.DEFINE_integer('stride', None, 'tokens between windows')
flags.DEFINE_bool('end', True, 'predict the end of the text')
flags.DEFINE_string('reference', None, 'what to compare with')
flags.DEFINE_bool('json', False, 'for programs')


def check(length: int):
  """Raises ConfigError for the first word that cannot be used. length: tokens of a window by default."""
  window = length if FLAGS.window is None else FLAGS.window
  for name in ('limit', 'window'):
    value = FLAGS[name].value
    if value is not None and value < 1: raise ConfigError(f'--{name}', value, 'must be at least 1')
  if FLAGS.stride is not None and not 1 <= FLAGS.stride <= window:
    raise ConfigError('--stride', FLAGS.stride, f'must be from 1 to {window}, the tokens of a window')
  if not FLAGS.end and (FLAGS.text is None or FLAGS.text.endswith('.npy')):
    raise ConfigError('--end', False, 'only a text file of --text has an end that can be left out')
  if FLAGS.reference and FLAGS.cache: raise ConfigError('--reference', FLAGS.reference, 'cannot be used with --cache')


def check_reference(tokenizer, reference):
  """Raises ConfigError where the reference does not have the same pieces of text at the same ids."""
  other = reference.tokenizer()
  pieces = lambda one: [one.decode_bytes([index]) for index in range(one.vocab_size)]
  if other.vocab_size == tokenizer.vocab_size and pieces(other) == pieces(tokenizer): return
  fix = f'must have the vocabulary of --run, whose {tokenizer.vocab_size} tokens are not its {other.vocab_size}'
  raise ConfigError('--reference', FLAGS.reference, fix)


def windows(source, tokenizer):
  """The windows that are read (`data.packing.Rows`), and how many of them at once: about as many tokens as in training."""
  from efficient_lm.data.packing import Rows
  trained, rows, length = commands.trained_as(source)
  if FLAGS.text is not None: stream = commands.text_stream(tokenizer)
  else: stream = trained.data.open(seed=0, tokenizer=tokenizer).evaluated
  if not FLAGS.end and tokenizer.eod is not None: stream = stream.first(len(stream.tokens) - 2)
  if FLAGS.limit is not None: stream = stream.first(FLAGS.limit)
  if stream.num_targets < 1: raise ConfigError('--text', FLAGS.text, 'holds nothing to predict')
  window = min(FLAGS.window or length, len(stream.tokens))   # a longer one would hold nothing more
  stride = FLAGS.stride and min(FLAGS.stride, window)
  return Rows(stream, window, stride), max(1, rows * length // window)


def main(overrides: list[str]):
  """Measures and prints."""
  source = commands.run_source()
  commands.check_text(source)
  check(commands.trained_as(source)[2])
  form = None if FLAGS.cache is None else commands.cache_format()
  reference = None if FLAGS.reference is None else commands.source_of(FLAGS.reference)
  import jax

  from efficient_lm.data.pipeline import in_sequence
  from efficient_lm.parallel.sharding import single_device_mesh
  from efficient_lm.runs import console
  tokenizer = source.tokenizer()
  if reference is not None: check_reference(tokenizer, reference)
  rows, at_once = windows(source, tokenizer)
  batches = console.track(in_sequence(rows, batch_size=at_once), 'reading', -(-len(rows) // at_once))
  mesh = single_device_mesh()
  with jax.set_mesh(mesh): found = measured(source, reference, form, batches, mesh)
  found |= {'window': rows.sequence_length, 'stride': rows.step}
  if FLAGS.json: print(json.dumps({'run': source.label, 'text': FLAGS.text, 'reference': FLAGS.reference, **found}))
  else: show(found)


def measured(source, reference, form, batches, mesh) -> dict[str, float]:
  """The figures, of the model that reads whole windows, or through a cache of a format, or beside another model."""
  from efficient_lm.models import decode
  from efficient_lm.training import comparison, evaluation
  model = source.load(mesh)
  if reference is not None: return comparison.compare(model, reference.load(mesh), batches, mesh)
  if form is None: return evaluation.evaluate(model, batches, mesh)
  sums = functools.partial(decode.cached_sums, cache=form)
  return evaluation.evaluate(decode.ready(model, donate=True), batches, mesh, sums)


def show(found: dict[str, float]):
  """A line, and one more of the comparison."""
  from efficient_lm.runs import console
  terminal = console.terminal()
  terminal.print(f'[bold]{found["bits_per_byte"]:.4f} bits per byte[/], perplexity {found["perplexity"]:.3f} a token, over '
                 f'{found["bytes"]} bytes in {found["tokens"]} tokens', soft_wrap=True)
  if 'kl' not in found: return
  terminal.print(f'[bold]KL {found["kl"]:.6f} nats a token[/] from the reference, whose perplexity is '
                 f'{found["reference_perplexity"]:.3f}; the likeliest token is the same at {found["same_top"]:.2%}',
                 soft_wrap=True)


if __name__ == '__main__': commands.start(main, __doc__)
