"""Bits per byte and perplexity of a trained model on any text:

  python -m efficient_lm.evaluate --run=runs/moe [--text=FILE] [--cache=FORMAT]

  --run=FOLDER      workdir of a training run
  --stage=N         the model of stage number N instead of that of the last
  --text=FILE       any text file (default: the held-out text of the run)
  --cache=FORMAT    read token by token, as generation does, through a cache in float, int8 or int4, each row as one
                    text (default: rows at once, documents apart)
  --cache_group=N   tokens that share a scale in int8 and int4 (default 1)
  --config=FILE     a config file whose own classes the run was made with
"""
import functools
import os

from absl import flags

from efficient_lm import commands
from efficient_lm.config import experiment
from efficient_lm.errors import ConfigError

FLAGS = flags.FLAGS
commands.define_run()
flags.DEFINE_string('text', None, 'text file')
commands.define_cache()


def batches_of(text: str | None, tokenizer, trained):
  """Batches of the file `text`, or of the run's held-out text, cut into rows as in training."""
  from efficient_lm.data.packing import Rows, pack
  from efficient_lm.data.pipeline import in_sequence
  rows, length = trained.train.batch_size // trained.train.accumulate, trained.train.sequence_length
  if text is None: return trained.data.open(seed=0, tokenizer=tokenizer).eval_batches(rows=rows, sequence_length=length)
  with open(text, 'rb') as file: content = file.read()
  try: stream = pack(tokenizer, [content])
  except ValueError as error: raise ConfigError('--text', text, str(error)) from error
  if stream.num_targets < 1: raise ConfigError('--text', text, 'holds nothing to predict')
  return in_sequence(Rows(stream, length), batch_size=rows)


def main(overrides: list[str]):
  """Measures and prints."""
  source = commands.run_source()
  if FLAGS.text is not None and not os.path.isfile(FLAGS.text):
    raise ConfigError('--text', FLAGS.text, 'there is no such file')
  form = None if FLAGS.cache is None else commands.cache_format()
  import jax

  from efficient_lm.models import decode
  from efficient_lm.parallel.sharding import single_device_mesh
  from efficient_lm.runs import console
  from efficient_lm.training.evaluation import evaluate
  batches, mesh = batches_of(FLAGS.text, source.tokenizer(), experiment.read(FLAGS.run)), single_device_mesh()
  with jax.set_mesh(mesh):
    model = source.load(mesh)
    if form is None: result = evaluate(model, batches, mesh)
    else:
      sums = functools.partial(decode.cached_sums, cache=form)
      result = evaluate(decode.ready(model, donate=True), batches, mesh, sums)
  console.terminal().print(f'[bold]{result["bits_per_byte"]:.4f} bits per byte[/], perplexity {result["perplexity"]:.3f} '
                           f'a token, over {result["bytes"]} bytes in {result["tokens"]} tokens')


if __name__ == '__main__': commands.start(main, __doc__)
