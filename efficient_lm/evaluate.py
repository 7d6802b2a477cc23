"""Bits per byte and perplexity of a trained model on any text:

  python -m efficient_lm.evaluate --run=runs/moe [--text=FILE] [--cache=FORMAT]

  --run=FOLDER      workdir of a training run
  --text=FILE       any text file (default: the held-out text of the run)
  --cache=FORMAT    read token by token, as generation does, through a cache in float, int8 or int4, each row as one
                    text (default: rows at once, documents apart)
  --cache_group=N   tokens that share a scale in int8 and int4 (default 1)
"""
import functools
import os

from absl import flags

from efficient_lm import commands
from efficient_lm.config import experiment
from efficient_lm.errors import ConfigError
from efficient_lm.lazy import lazy

console = lazy('efficient_lm.runs.console')
decode = lazy('efficient_lm.models.decode')
jax = lazy('jax')
packing = lazy('efficient_lm.data.packing')
pipeline = lazy('efficient_lm.data.pipeline')
run = lazy('efficient_lm.runs.run')
train = lazy('efficient_lm.training.trainer')

FLAGS = flags.FLAGS
commands.define_run()
flags.DEFINE_string('text', None, 'text file')
commands.define_cache()


def batches_of(text: str | None, folder: str, trained):
  """Batches of the file `text`, or of the run's held-out text, cut into rows as in training."""
  training = trained.train
  if text is None:
    corpus = trained.data.open(sequence_length=training.sequence_length, batch_size=training.batch_size, seed=0)
    return corpus.eval_batches()
  with open(text, 'rb') as file: content = file.read()
  if len(content) < 2: raise ConfigError('--text', text, 'must hold at least two bytes')
  tokenizer = run.load_tokenizer(folder)
  rows = packing.Rows(*packing.concatenate(tokenizer, [content]), tokenizer.bytes_V, training.sequence_length)
  return pipeline.in_sequence(rows, batch_size=training.batch_size, limit=len(rows))


def main(overrides: list[str]):
  """Measures and prints."""
  commands.require_run(FLAGS.run)
  if FLAGS.text is not None and not os.path.isfile(FLAGS.text):
    raise ConfigError('--text', FLAGS.text, 'there is no such file')
  form = None if FLAGS.cache is None else commands.cache_format()
  batches = batches_of(FLAGS.text, FLAGS.run, experiment.read(FLAGS.run))
  mesh = run.single_device_mesh()
  with jax.set_mesh(mesh):
    model = run.load_model(FLAGS.run, mesh)
    if form is None: result = train.evaluate(model, batches, mesh)
    else: result = train.evaluate(decode.ready(model), batches, mesh, functools.partial(decode.cached_sums, cache=form))
  console.terminal().print(f'[bold]{result["bits_per_byte"]:.4f} bits per byte[/], perplexity {result["perplexity"]:.3f} '
                           f'a token, over {result["bytes"]} bytes in {result["tokens"]} tokens')


if __name__ == '__main__': commands.start(main, __doc__)
