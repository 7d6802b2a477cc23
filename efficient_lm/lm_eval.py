"""Tasks of the Language Model Evaluation Harness, on any model that --run can name:

  python -m efficient_lm.lm_eval --run=models/smollm2 --tasks=mine --include_path=FOLDER

  --run=FOLDER        workdir of a training run, a Hugging Face folder, or a GGUF file
  --stage=N           the model of stage number N instead of that of the last
  --packed            matrices of a GGUF file stay in the few bits that it stores
  --max_length=N      tokens that are read of a text (default: the model's context; of a run, a row of its training)
  --batch_size=N      texts that are read at once (default: as many as make some thousand tokens)

All other words are those of `lm-eval run`, which --help lists where the package is installed: pip install
"efficient_lm[lm-eval]". Tasks that lie in a folder with their data need no network:

  FOLDER/mine.yaml    task: mine
                      dataset_path: json
                      dataset_kwargs: {data_files: {test: FOLDER/mine.jsonl}}
                      test_split: test
                      output_type: multiple_choice
                      doc_to_text: "{{question}}"
                      doc_to_choice: "{{choices}}"
                      doc_to_target: "{{answer}}"
"""
import functools
import json
import os
import sys

from absl import flags

from efficient_lm import commands
from efficient_lm.errors import ConfigError

FLAGS = flags.FLAGS
commands.define_run()
flags.DEFINE_integer('max_length', None, 'tokens of a text')
flags.DEFINE_integer('batch_size', None, 'texts at once')
OWN = ('run', 'stage', 'max_length', 'batch_size')
CHATS = ('apply_chat_template', 'fewshot_as_multiturn')
NAME = 'efficient_lm'


def divided(words: list[str]) -> tuple[list[str], list[str]]:
  """The words of this command, each as --name=value, and those of the harness. Raises ConfigError for words of the harness
  that have no place here."""
  own, rest, words = [], [], list(words)
  while words:
    word = words.pop(0)
    name, equals, _ = word.lstrip('-').partition('=')
    if name in OWN and word.startswith('-'): own.append(word if equals or not words else f'{word}={words.pop(0)}')
    else: rest.append(word)
  for word in rest:
    name = word.lstrip('-').partition('=')[0]
    if word.startswith('--') and name in ('model', 'model_args'):
      raise ConfigError(f'--{name}', word, 'must be left out: the model is that of --run')
    if word.startswith('--') and name in CHATS:
      raise ConfigError(f'--{name}', True, 'cannot be used: tasks are read as plain text, not as chats')
  return own, rest


def main(rest: list[str], overrides: list[str]):
  """Evaluates: what `lm-eval run` does of a model that is loaded here."""
  source = commands.run_source()
  for name in ('max_length', 'batch_size'):
    value = FLAGS[name].value
    if value is not None and value < 1: raise ConfigError(f'--{name}', value, 'must be at least 1')
  harness = package()
  longest = FLAGS.max_length or (source.context if hasattr(source, 'context') else commands.trained_as(source)[2])

  class Model(harness.Model):
    """The model of --run, as the harness makes one from the words that it is given."""
    def __init__(self, run: str, **_):
      del run   # for the record of the harness
      super().__init__(source.load(), source.tokenizer(), longest, FLAGS.batch_size)
  # Where a model is registered before `models` is imported, all of the harness's own are missing.
  import lm_eval.models
  from lm_eval._cli import HarnessCLI

  lm_eval.api.registry.register_model(NAME)(Model)
  lm_eval.utils.setup_logging()
  os.environ.setdefault('DISABLE_MULTIPROC', '1')   # its errors of means would be computed in forks of a process with JAX
  arguments = json.dumps({'run': source.label})
  sys.argv = ['lm_eval', 'run', '--model', NAME, '--model_args', arguments, *rest]
  cli = HarnessCLI()
  cli.execute(cli.parse_args())


def package():
  """`interop.harness`. Raises ConfigError where the package that it is for is missing."""
  try:
    from efficient_lm.interop import harness
    return harness
  except ImportError as error:
    if (error.name or '').split('.')[0] not in ('lm_eval', 'tqdm'): raise
    fix = 'needs the package lm-eval: pip install "efficient_lm[lm-eval]"'
    raise ConfigError('efficient_lm.lm_eval', error.name, fix) from error


def start(words: list[str]):
  """Runs the command on these words; those of the harness pass by the flags of this one."""
  try: own, rest = divided(words)
  except ConfigError as error:
    print(error, file=sys.stderr)
    sys.exit(error.exit_code)
  sys.argv[1:] = own
  commands.start(functools.partial(main, rest), __doc__)


if __name__ == '__main__': start(sys.argv[1:])
