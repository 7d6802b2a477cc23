"""Takes a trained model away, in the files of other engines:

  python -m efficient_lm.export --run=runs/moe --format=hf --out=exported/moe

  --run=FOLDER      workdir of a training run, a Hugging Face folder, or a GGUF file
  --stage=N         the model of stage number N instead of that of the last
  --packed          matrices of a GGUF file stay in the few bits that it stores
  --format=NAME     hf                   safetensors of floats, for transformers, vLLM and their kin
                    compressed-tensors   matrices in few bits as vLLM and transformers read them
                    gguf                 one file for llama.cpp and its kin, few bits as blocks of the same numbers
                    stablehlo            programs for CPU, CUDA and TPU that jax alone runs
                    litert               one file for the interpreter of phones
  --out=FOLDER      new folder for the files; beside them parity.json and README.md say whether the other engine, where it
                    is installed, computes the same
  --dtype=NAME      of what is written in floats: float32, bfloat16 or float16 (default: as the model holds it)
  --text=FILE       what both engines are compared on (default: held-out text of the run; otherwise source code of Python's)
  --config=FILE     a config file whose own classes the run was made with
"""
import inspect

from absl import flags

from efficient_lm import commands
from efficient_lm.config import paths
from efficient_lm.errors import ConfigError
from efficient_lm.runs import FromRun

FLAGS = flags.FLAGS
commands.define_run()
commands.define_text()
flags.DEFINE_string('format', None, 'of what is written')
commands.define_out()
flags.DEFINE_string('dtype', None, 'of what is written in floats')


def target():
  """What --format and --dtype describe. Raises ConfigError."""
  from efficient_lm.interop import targets
  kinds = {'hf': targets.HuggingFaceFolder, 'compressed-tensors': targets.CompressedTensors, 'gguf': targets.GgufFile,
           'stablehlo': targets.StableHlo, 'litert': targets.LiteRT}
  if FLAGS.format not in kinds: raise ConfigError('--format', FLAGS.format, f'must be one of {", ".join(kinds)}')
  kind, field = kinds[FLAGS.format], {'gguf': 'floats', 'stablehlo': None, 'litert': None}.get(FLAGS.format, 'dtype')
  if FLAGS.dtype is not None and field is None:
    raise ConfigError('--dtype', FLAGS.dtype, f'must be left out: {FLAGS.format} has arrays as the model holds them')
  made = kind(**{} if FLAGS.dtype is None else {field: FLAGS.dtype})
  for field, value, fix in made.check(): raise ConfigError('--dtype' if FLAGS.dtype else f'--{field}', value, fix)
  return made


def sample(source, tokenizer) -> tuple:
  """Tokens (1, T) that engines are compared on, and what text they are of. Raises ConfigError for a file of no text."""
  import numpy as np

  from efficient_lm.interop.export import TOKENS
  if FLAGS.text is not None:
    commands.check_text(source)
    with open(FLAGS.text, 'rb') as file: content, name = file.read(16 * TOKENS), FLAGS.text
  elif isinstance(source, FromRun):
    documents = commands.trained_as(source)[0].data.open(seed=0, tokenizer=tokenizer).eval_documents()
    content, name = documents[0].content[:16 * TOKENS], 'its held-out text'
  else:
    import textwrap
    content, name = inspect.getsource(textwrap).encode(), 'textwrap.py of Python'
  try: ids = tokenizer.prompt(content)
  except ValueError as error: raise ConfigError('--text', FLAGS.text, str(error)) from error
  if len(ids) < 2: raise ConfigError('--text', FLAGS.text, 'holds nothing to predict')
  return np.asarray(ids)[None, :TOKENS], name


def main(overrides: list[str]):
  """Writes and says what was written."""
  source = commands.run_source()
  made = target()
  if not FLAGS.out: raise ConfigError('--out', FLAGS.out, 'is missing: write --out=exported/moe, say')
  paths.check_folder('--out', FLAGS.out)
  from efficient_lm.interop.export import export
  from efficient_lm.runs import console, writing
  from efficient_lm.tree import num_bytes
  tokenizer = source.tokenizer()
  length = commands.trained_as(source)[2] if isinstance(source, FromRun) else source.context
  tokens_BT, text = sample(source, tokenizer)
  model = source.load()
  with writing.needed(FLAGS.out): writing.check_room(FLAGS.out, num_bytes(model))
  notes = export(made, model, tokenizer, FLAGS.out, source=source.label, length=length,
                 tokens_BT=tokens_BT[:, :length], text=text)
  print_ = console.terminal().print
  print_(f'[bold]{FLAGS.out}[/]: {made.title} of {source.label}')
  for note in notes: print_(note)


if __name__ == '__main__': commands.start(main, __doc__)
