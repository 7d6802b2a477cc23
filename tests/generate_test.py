"""Text from a run, as a user asks for it in a terminal: where it ends, what cannot be asked for, what terminals can show."""
import io
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from efficient_lm import generate
from efficient_lm.commands import exit_code
from efficient_lm.models import decode
from efficient_lm.runs import loading, record, run
from tests import minute

ROOT = pathlib.Path(__file__).parent.parent
DEFAULTS = {'prompt': 'a', 'tokens': 8, 'stop': None, 'temperature': 0.8, 'top_k': None, 'top_p': None, 'seed': 0,
            'chat': False, 'system': None}


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
  folder = tmp_path_factory.mktemp('run')
  made = minute.over_bytes(folder)
  run.run(made, made, folder / 'run')
  return folder / 'run'


@pytest.fixture
def said(workdir, capsys):
  """said(code, **words): what generate prints, on standard output if it succeeds, else on standard error."""
  def call(code=0, **words):
    given = [f'--{name}={value}' for name, value in (DEFAULTS | words).items() if value is not None]
    try: assert exit_code(generate.main, ['generate', f'--run={workdir}', *given]) == code
    finally:
      for name in DEFAULTS: generate.FLAGS[name].unparse()
    out, err = capsys.readouterr()
    return err if code else out
  return call


def test_text_ends_at_the_end_of_a_document_and_shows_no_mark(said, workdir):
  tokenizer = record.tokenizer(workdir)
  lengths = set()
  for seed in range(6):
    text = said(seed=seed, tokens=200, temperature=1)
    prompt = tokenizer.prompt('a')
    drawn = np.concatenate(list(decode.stream(loading.load_model(workdir), prompt[None], 200, seed=seed,
                                              vocab_size=tokenizer.vocab_size, stops=tokenizer.stops)), 1)[0]
    expected = decode.until_stop(drawn, tokenizer.stops)
    assert text == 'a' + tokenizer.decode_bytes(expected).decode('utf-8', 'replace') + '\n'
    lengths.add(len(expected))
  assert min(lengths) < 200, 'one of them has come to an end'


def test_the_same_words_say_the_same_and_another_seed_another(said):
  assert said(seed=3) == said(seed=3) != said(seed=4)


def test_a_stop_text_ends_it_and_is_not_shown(said):
  whole = said(tokens=60, temperature=1)
  stop = next(whole[i:i + 2] for i in range(5, len(whole)) if whole[i:i + 2].isascii() and whole[i:i + 2].isprintable())
  assert said(tokens=60, temperature=1, stop=stop) == whole[:whole.index(stop, 1)] + '\n'


@pytest.mark.parametrize('words, wrong', [
  ({'temperature': 'nan'}, '--temperature = nan: must be 0'), ({'temperature': 'inf'}, '--temperature = inf: must be 0'),
  ({'top_p': 0}, '--top_p = 0'), ({'top_p': 'nan'}, '--top_p = nan'), ({'top_k': 0}, '--top_k = 0'),
  ({'seed': 2 ** 70}, '--seed = 1180591620717411303424'), ({'seed': -1}, '--seed = -1'),
  ({'tokens': 10 ** 11}, '--tokens = 100,000,000,000: keys and values of so many tokens take'),
  ({'tokens': 0}, '--tokens = 0'), ({'stop': ''}, "--stop = ''"), ({'system': 'x'}, "--system = 'x': needs --chat"),
  ({'chat': True, 'prompt': None}, '--prompt = None: is missing'),
  ({'chat': True}, '--chat = True: this model has no template for chats')])
def test_what_cannot_be_asked_for_is_one_line(said, words, wrong):
  error = said(code=2, **words)
  assert wrong.replace(',', '') in error.replace(',', '') and error.count('\n') == 1


def test_an_empty_prompt_begins_a_document(said):
  assert len(said(prompt='', tokens=60)) > 1


@pytest.mark.parametrize('temperature', ['1e-38', '1e-7', '0'])
def test_a_temperature_next_to_nothing_is_greedy(said, temperature):
  assert said(temperature=temperature) == said(temperature=0, seed=9)


@pytest.fixture(scope='module')
def shell(workdir):
  """shell(script, **environment) -> the finished process, of bytes, in which $GENERATE is the command."""
  def call(script, **environment):
    command = f'{sys.executable} -m efficient_lm.generate --run={workdir} --tokens=24'
    return subprocess.run(['bash', '-c', f'set -o pipefail; GENERATE="{command}"; {script}'], cwd=ROOT, capture_output=True,
                          env={**os.environ, 'XLA_FLAGS': '', **environment}, check=False)
  return call


def test_a_prompt_of_any_bytes_and_a_terminal_of_few_characters(shell):
  done = shell(r'''$GENERATE --prompt=$'caf\xe9 \xff'; $GENERATE --prompt='ä€😀' ''', PYTHONIOENCODING='ascii', LC_ALL='C')
  assert done.returncode == 0, done.stderr
  first, *_ = done.stdout.split(b'\n')
  assert first.startswith(b'caf? ?') and all(byte < 128 for byte in done.stdout)


def test_a_reader_may_have_seen_enough(shell):
  done = shell('$GENERATE --prompt=abc | head -c 3')
  assert (done.returncode, done.stdout) == (0, b'abc'), done.stderr
  assert b'Traceback' not in done.stderr


def shown(pieces, stop=None):
  out = io.StringIO()
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sys, 'stdout', out)
    made = generate.Shown(stop)
    for piece in pieces:
      if made.add(piece): break
    made.close()
  return out.getvalue()


@pytest.mark.parametrize('text', ['plain', 'ä€😀 x', 'abSTOabSTOPcd'])
@pytest.mark.parametrize('size', range(1, 5))
def test_text_is_the_same_however_it_comes_in_pieces(text, size):
  content = text.encode()
  pieces = [content[i:i + size] for i in range(0, len(content), size)]
  assert shown(pieces) == text + '\n'
  assert shown(pieces, 'STOP') == text.split('STOP')[0] + '\n'
