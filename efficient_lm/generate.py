"""Streams a sample from a trained model:

  python -m efficient_lm.generate --run=runs/moe --prompt='def '

  --run=FOLDER        workdir of a training run, a Hugging Face folder, or a GGUF file
  --stage=N           the model of stage number N instead of that of the last
  --packed            matrices of a GGUF file stay in the few bits that it stores
  --prompt=TEXT       what to continue (default 'def ')
  --chat              --prompt is a message, to which the model replies: for models that were trained on chats
  --system=TEXT       with --chat, what stands before the message (default: what the model's template has there)
  --tokens=N          how many tokens to draw at most (default 400); the end of a document ends the text
  --stop=TEXT         end where this has been drawn, too
  --temperature=X     0 takes the most likely token each time (default 0.8)
  --top_k=K           draw from the K most likely tokens only
  --top_p=P           draw from the fewest most likely tokens whose probabilities reach P
  --seed=N            the same seed draws the same text (default 0)
  --cache=FORMAT      of keys and values of tokens read: float (default), int8 or int4
  --cache_group=N     tokens that share a scale (default: 1 in int8, 32 in int4)
  --config=FILE       a config file whose own classes the run was made with
"""
import math
import sys
import time

from absl import flags

from efficient_lm import commands
from efficient_lm.errors import ConfigError

FLAGS = flags.FLAGS
commands.define_run()
flags.DEFINE_string('prompt', 'def ', 'text to continue')
flags.DEFINE_bool('chat', False, 'reply to the prompt')
flags.DEFINE_string('system', None, 'what stands before the message of a chat')
flags.DEFINE_integer('tokens', 400, 'tokens to draw')
flags.DEFINE_string('stop', None, 'text to end at')
flags.DEFINE_float('temperature', 0.8, '0 is greedy')
flags.DEFINE_integer('top_k', None, 'most likely tokens to draw from')
flags.DEFINE_float('top_p', None, 'probability to draw from')
flags.DEFINE_integer('seed', 0, 'of the draw')
commands.define_cache()
SEEDS = 2 ** 32   # of JAX's keys


def check():
  """Raises ConfigError for the first word that cannot be used."""
  if FLAGS.tokens < 1: raise ConfigError('--tokens', FLAGS.tokens, 'must be at least 1')
  if not 0 <= FLAGS.temperature < math.inf:
    raise ConfigError('--temperature', FLAGS.temperature, 'must be 0 (greedy) or positive and finite')
  if FLAGS.top_k is not None and FLAGS.top_k < 1: raise ConfigError('--top_k', FLAGS.top_k, 'must be at least 1')
  if FLAGS.top_p is not None and not 0 < FLAGS.top_p <= 1:
    raise ConfigError('--top_p', FLAGS.top_p, 'must be above 0 and at most 1')
  if not 0 <= FLAGS.seed < SEEDS: raise ConfigError('--seed', FLAGS.seed, f'must be at least 0 and below {SEEDS}')
  if FLAGS.system is not None and not FLAGS.chat: raise ConfigError('--system', FLAGS.system, 'needs --chat')
  if FLAGS.chat and not FLAGS['prompt'].present: raise ConfigError('--prompt', None, 'is missing: it is the message')
  if FLAGS.stop == '': raise ConfigError('--stop', FLAGS.stop, 'must hold at least one character')


def main(overrides: list[str]):
  """Prints the prompt and its continuation, or the reply, as it is drawn, then the speed on standard error."""
  source = commands.run_source()
  check()
  form = commands.cache_format()
  from efficient_lm.models import decode
  tokenizer = source.tokenizer()
  prompt = prompt_ids(tokenizer)
  model = decode.ready(source.load(), donate=True)
  check_memory(model, len(prompt), form)
  sampling = decode.Sampling(FLAGS.temperature, FLAGS.top_k, FLAGS.top_p)
  shown = Shown(FLAGS.stop)
  if not FLAGS.chat: shown.write(FLAGS.prompt.encode('utf-8', 'surrogateescape'))
  drawn, clock = 0, None
  for ids in decode.stream(model, prompt[None], FLAGS.tokens, sampling=sampling, seed=FLAGS.seed,
                           vocab_size=tokenizer.vocab_size, cache=form, stops=tokenizer.stops):
    if shown.add(tokenizer.decode_bytes(decode.until_stop(ids[0], tokenizer.stops))): break
    if clock is None: clock = time.perf_counter()   # the first burst compiles
    else: drawn += ids.shape[1]
  shown.close()
  if drawn: print(f'{drawn / (time.perf_counter() - clock):.0f} tokens per second', file=sys.stderr)


def prompt_ids(tokenizer):
  """Of the text to continue, or of the chat to reply to. Raises ConfigError."""
  if FLAGS.chat:
    from efficient_lm.data import chat
    system = [] if FLAGS.system is None else [{'role': 'system', 'content': FLAGS.system}]
    return chat.encode(tokenizer, [*system, {'role': 'user', 'content': FLAGS.prompt}])
  try: return tokenizer.prompt(FLAGS.prompt)
  except ValueError as error: raise ConfigError('--prompt', FLAGS.prompt, str(error)) from error


def check_memory(model, prompt: int, form):
  """Raises ConfigError where keys and values of all tokens would not fit into the memory that is free."""
  import jax

  from efficient_lm.runs.measure import free_memory
  from efficient_lm.tree import num_bytes
  needed, free = num_bytes(jax.eval_shape(lambda: model.init_cache(1, prompt + FLAGS.tokens, form))), free_memory()
  if free is None or needed < free: return
  fix = f'keys and values of so many tokens take {needed:,} bytes, and {free:,} are free: ask for fewer'
  raise ConfigError('--tokens', FLAGS.tokens, fix)


class Shown:
  """Text on standard output as it comes, whole characters at a time, up to a stop text."""

  def __init__(self, stop: str | None):
    self.stop, self.pending = (stop or '').encode('utf-8', 'surrogateescape'), b''

  def add(self, text: bytes) -> bool:
    """Shows what is certain to be part of the text; whether that has come to its stop."""
    self.pending += text
    at = self.pending.find(self.stop) if self.stop else -1
    if at >= 0: self.pending = self.pending[:at]
    kept = 0 if at >= 0 or not self.stop else len(self.stop) - 1   # it may be the beginning of a stop
    certain = self.pending[:max(len(self.pending) - kept, 0)]
    cut = len(certain) - incomplete(certain)
    self.write(self.pending[:cut])
    self.pending = self.pending[cut:]
    return at >= 0

  def close(self):
    """Shows the rest."""
    self.write(self.pending + b'\n')

  @staticmethod
  def write(text: bytes):
    """Bytes that are no text, and characters that the terminal cannot show, as a replacement."""
    encoding = sys.stdout.encoding or 'utf-8'
    print(text.decode('utf-8', 'replace').encode(encoding, 'replace').decode(encoding), end='', flush=True)


def incomplete(text: bytes) -> int:
  """How many bytes at the end are the beginning of a character."""
  for length in range(1, min(4, len(text)) + 1):
    byte = text[-length]
    if byte & 0xC0 != 0x80: return length if length < 1 + (byte >= 0xC0) + (byte >= 0xE0) + (byte >= 0xF0) else 0
  return 0


if __name__ == '__main__': commands.start(main, __doc__)
