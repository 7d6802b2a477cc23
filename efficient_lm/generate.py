"""Streams a sample from a trained model:

  python -m efficient_lm.generate --run=runs/moe --prompt='def '

  --run=FOLDER        workdir of a training run
  --prompt=TEXT       what to continue; at least one character (default 'def ')
  --tokens=N          how many tokens to draw (default 400)
  --temperature=X     0 takes the most likely token each time (default 0.8)
  --top_k=K           draw from the K most likely tokens only
  --top_p=P           draw from the fewest most likely tokens whose probabilities reach P
  --seed=N            the same seed draws the same text (default 0)
  --cache=FORMAT      of keys and values of tokens read: float (default), int8 or int4
  --cache_group=N     tokens that share a scale in int8 and int4 (default 1)
"""
import sys
import time

from absl import flags

from efficient_lm import commands
from efficient_lm.errors import ConfigError
from efficient_lm.lazy import lazy

decode = lazy('efficient_lm.models.decode')
run = lazy('efficient_lm.runs.run')

FLAGS = flags.FLAGS
commands.define_run()
flags.DEFINE_string('prompt', 'def ', 'text to continue')
flags.DEFINE_integer('tokens', 400, 'tokens to draw')
flags.DEFINE_float('temperature', 0.8, '0 is greedy')
flags.DEFINE_integer('top_k', None, 'most likely tokens to draw from')
flags.DEFINE_float('top_p', None, 'probability to draw from')
flags.DEFINE_integer('seed', 0, 'of the draw')
commands.define_cache()


def main(overrides: list[str]):
  """Prints the prompt and its continuation as it is drawn, then the speed on standard error."""
  commands.require_run(FLAGS.run)
  if FLAGS.tokens < 1: raise ConfigError('--tokens', FLAGS.tokens, 'must be at least 1')
  if not FLAGS.prompt: raise ConfigError('--prompt', FLAGS.prompt, 'must hold at least one character')
  if FLAGS.temperature < 0: raise ConfigError('--temperature', FLAGS.temperature, 'must be 0 (greedy) or positive')
  if FLAGS.top_k is not None and FLAGS.top_k < 1: raise ConfigError('--top_k', FLAGS.top_k, 'must be at least 1')
  if FLAGS.top_p is not None and not 0 < FLAGS.top_p <= 1:
    raise ConfigError('--top_p', FLAGS.top_p, 'must be above 0 and at most 1')
  cache = commands.cache_format()
  sampling = decode.Sampling(FLAGS.temperature, FLAGS.top_k, FLAGS.top_p)
  tokenizer, model = run.load_tokenizer(FLAGS.run), run.load_model(FLAGS.run)
  prompt = tokenizer.encode(FLAGS.prompt)
  print(FLAGS.prompt, end='', flush=True)
  drawn, clock, pending = 0, None, b''
  for ids in decode.stream(model, prompt[None], FLAGS.tokens, sampling=sampling, seed=FLAGS.seed,
                           vocab_size=tokenizer.vocab_size, cache=cache):
    pending = show(pending + tokenizer.decode_bytes(ids[0]))
    if clock is None: clock = time.perf_counter()   # the first burst compiles
    else: drawn += ids.shape[1]
  print(pending.decode('utf-8', 'replace'))
  if drawn: print(f'{drawn / (time.perf_counter() - clock):.0f} tokens per second', file=sys.stderr)


def show(text: bytes) -> bytes:
  """Prints all whole characters and returns the bytes of one that is still incomplete."""
  for cut in range(len(text), max(len(text) - 4, -1), -1):
    try: whole = text[:cut].decode('utf-8')
    except UnicodeDecodeError: continue
    print(whole, end='', flush=True)
    return text[cut:]
  print(text.decode('utf-8', 'replace'), end='', flush=True)
  return b''


if __name__ == '__main__': commands.start(main, __doc__)
