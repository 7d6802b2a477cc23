"""The harness's own evaluation of tasks in a folder, beside the model asked directly; without it, one line."""
import importlib.util
import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from efficient_lm import commands, lm_eval
from efficient_lm.config import experiment
from efficient_lm.errors import ConfigError
from efficient_lm.runs import FromRun, run

TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: {kind}
target_delimiter: ""
{words}
metric_list: [{{metric: {metric}}}]
"""
KINDS = {
  'choose': ('multiple_choice', 'acc', 'doc_to_text: "{{text}}"\ndoc_to_choice: "{{choices}}"\ndoc_to_target: 0'),
  'write': ('generate_until', 'exact_match', 'doc_to_text: "{{text}}"\ndoc_to_target: "abc"\n'
            'generation_kwargs: {until: ["aa"], max_gen_toks: 5}')}
HERE = importlib.util.find_spec('lm_eval') is not None


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """A run of no steps on eight symbols, and tasks over them."""
  folder = tmp_path_factory.mktemp('harness')
  run.run(*experiment.load('tests/minute.py:quick', ['--config.train.steps=0']), folder / 'run')
  texts = [''.join('abcdefgh'[i] for i in row) for row in np.random.default_rng(0).integers(0, 8, (5, 9))]
  rows = [{'text': text[:3 + i], 'choices': [text[3 + i:], text[2:4], 'h']} for i, text in enumerate(texts)]
  (folder / 'rows.jsonl').write_text('\n'.join(map(json.dumps, rows)))
  for name, (kind, metric, words) in KINDS.items():
    task = TASK.format(name=name, data=folder / 'rows.jsonl', kind=kind, metric=metric, words=words)
    (folder / f'{name}.yaml').write_text(task)
  return folder


@pytest.mark.skipif(not HERE, reason='lm-eval is not installed: pip install "efficient_lm[lm-eval]"')
def test_the_harness_finds_what_the_model_gives(folder):
  words = [f'--run={folder / "run"}', '--batch_size', '2', '--tasks', 'choose,write', '--include_path', str(folder),
           '--log_samples', '--output_path', str(folder / 'out')]
  done = subprocess.run([sys.executable, '-m', 'efficient_lm.lm_eval', *words], capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr
  samples = {kind: [json.loads(line) for line in next((folder / 'out').rglob(f'samples_{kind}_*')).read_text().splitlines()]
             for kind in KINDS}
  source = FromRun(path=str(folder / 'run'))
  model, tokenizer = source.load(), source.tokenizer()
  seen = 0
  for sample in samples['choose']:
    for arguments, response in zip(sample['arguments'].values(), sample['resps']):
      context, continuation = (tokenizer.encode(arguments[name]) for name in ('arg_0', 'arg_1'))
      ids = np.concatenate([context, continuation])
      logits = np.asarray(model(ids[None]).logits_BTV[0], np.float64)
      log_p = (logits - np.log(np.exp(logits).sum(-1, keepdims=True)))[len(context) - 1:-1]
      found = log_p[np.arange(len(continuation)), continuation].sum()
      assert float(response[0][0]) == pytest.approx(found, rel=1e-5)
      assert str(response[0][1]) == str(bool((log_p.argmax(-1) == continuation).all()))
      seen += 1
  assert seen == 15
  for sample in samples['write']:
    ids = tokenizer.encode(next(iter(sample['arguments'].values()))['arg_0']).tolist()
    for _ in range(5): ids.append(int(np.argmax(model(np.array(ids)[None]).logits_BTV[0, -1])))
    assert sample['resps'][0][0] == tokenizer.decode(ids[-5:]).partition('aa')[0]


@pytest.mark.skipif(HERE, reason='lm-eval is installed')
def test_without_the_package_it_is_one_line(capsys):
  words = ['lm_eval', f'--run={pathlib.Path(__file__).parent / "interop" / "fixtures" / "llama"}']
  try: assert commands.exit_code(lambda overrides: lm_eval.main([], overrides), words) == 2
  finally: lm_eval.FLAGS['run'].unparse()
  error = capsys.readouterr().err
  assert error.count('\n') == 1 and 'pip install "efficient_lm[lm-eval]"' in error


def test_words_of_the_harness_pass_by():
  words = ['--run', 'folder', '--tasks', 'a', 'b', '--limit=3', '--stage=1', '-s', '--max_length', '9', '--seed', '1']
  own, rest = lm_eval.divided(words)
  assert own == ['--run=folder', '--stage=1', '--max_length=9']
  assert rest == ['--tasks', 'a', 'b', '--limit=3', '-s', '--seed', '1']


@pytest.mark.parametrize('word', ['--model=hf', '--model_args', '--apply_chat_template'])
def test_words_that_have_no_place_are_refused(word):
  with pytest.raises(ConfigError, match=word.partition('=')[0]): lm_eval.divided(['--run=folder', word])
