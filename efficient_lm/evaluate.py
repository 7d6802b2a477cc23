"""Bits per byte and perplexity of a trained model on any text:

  python -m efficient_lm.evaluate --run=runs/moe [--text=FILE] [--cache=FORMAT]

  --run=FOLDER      workdir of a training run, or a Hugging Face folder
  --stage=N         the model of stage number N instead of that of the last
  --text=FILE       any text file (default: the held-out text of the run; a Hugging Face folder has none)
  --cache=FORMAT    read token by token, as generation does, through a cache in float, int8 or int4, each row as one
                    text (default: rows at once, documents apart)
  --cache_group=N   tokens that share a scale (default: 1 in int8, 32 in int4)
  --config=FILE     a config file whose own classes the run was made with
"""
import functools

from absl import flags

from efficient_lm import commands

FLAGS = flags.FLAGS
commands.define_run()
commands.define_text()
commands.define_cache()


def batches_of(source):
  """Batches of the file --text, or of the run's held-out text, cut into rows as in training."""
  if FLAGS.text is not None: return commands.text_batches(source)
  trained, rows, length = commands.trained_as(source)
  return trained.data.open(seed=0, tokenizer=source.tokenizer()).eval_batches(rows=rows, sequence_length=length)


def main(overrides: list[str]):
  """Measures and prints."""
  source = commands.run_source()
  commands.check_text(source)
  form = None if FLAGS.cache is None else commands.cache_format()
  import jax

  from efficient_lm.models import decode
  from efficient_lm.parallel.sharding import single_device_mesh
  from efficient_lm.runs import console
  from efficient_lm.training.evaluation import evaluate
  batches, mesh = batches_of(source), single_device_mesh()
  with jax.set_mesh(mesh):
    model = source.load(mesh)
    if form is None: result = evaluate(model, batches, mesh)
    else:
      sums = functools.partial(decode.cached_sums, cache=form)
      result = evaluate(decode.ready(model, donate=True), batches, mesh, sums)
  console.terminal().print(f'[bold]{result["bits_per_byte"]:.4f} bits per byte[/], perplexity {result["perplexity"]:.3f} '
                           f'a token, over {result["bytes"]} bytes in {result["tokens"]} tokens')


if __name__ == '__main__': commands.start(main, __doc__)
