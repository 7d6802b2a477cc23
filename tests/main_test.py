"""Each mistake, through the shell: exit code 2, at most two lines that name field, value and fix, nothing written."""
import os
import pathlib
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).parent.parent
MOE = f'--config={ROOT}/configs/moe.py'
SECONDS = 20   # about half a second on an idle machine; the bound is for a busy one


def run(folder, *words):
  started = time.perf_counter()
  done = subprocess.run([sys.executable, '-m', 'efficient_lm.main', *words], cwd=folder, capture_output=True, text=True,
                        env={**os.environ, 'PYTHONPATH': str(ROOT)}, timeout=120, check=False)
  seconds = time.perf_counter() - started
  print(f'{seconds:.2f} s: {" ".join(words)}\n{done.stderr}', end='')
  return done, seconds


@pytest.mark.parametrize('words, said', [
  ([MOE, '--config.train.stpes=5'], ['config.train.stpes', '5', 'did you mean steps?', 'batch_size']),
  ([MOE, '--config.model.stacks[0].mlp.num_expert=5'], ['num_expert =', 'did you mean num_experts?', 'hidden']),
  ([MOE, '--config.trian.steps=5'], ['config.trian', 'did you mean train?', 'mesh']),
  ([MOE, '--config.train.steps=many'], ['config.train.steps', 'many', 'whole number']),
  ([MOE, '--config.train.steps=1.5'], ['config.train.steps', '1.5', 'whole number']),
  ([MOE, '--config.train.steps=-5'], ['config.train.steps', '-5', 'at least 0']),
  ([MOE, '--config.train.steps=None'], ['config.train.steps', 'None', 'whole number']),
  ([MOE, '--config.model.tied=perhaps'], ['config.model.tied', 'perhaps', 'True or False']),
  ([MOE, '--config.model.stacks.mlp.hidden=5'], ['config.model.stacks', 'write config.model.stacks[0].mlp']),
  ([MOE, '--config.model.stacks[4].mlp.hidden=5'], ['config.model.stacks[4]', 'has 1 elements']),
  ([MOE, '--config.model.stacks[0].mlp.router.top_k=99'], ['top_k', '99', 'num_experts = 8']),
  ([MOE, '--config.model.stacks[0].attention.num_kv_heads=3'], ['num_kv_heads', '3', 'must divide num_heads = 4']),
  ([MOE, '--config.mesh.expert=3'], ['config.train.batch_size', '16', 'multiple of 3']),
  ([MOE, '--config.data=x'], ['config.data', 'Corpus']),
  ([MOE, 'config.train.steps=3'], ['config.train.steps=3', 'did you mean --config.train.steps=3?']),
  ([MOE, '--config.train.steps', '3'], ["'3'", 'equals sign']),
  ([MOE, '--workdri=runs/x'], ['--workdri', 'did you mean --workdir']),
  ([MOE, '--confg.train.steps=3'], ['--confg.train.steps', 'did you mean --config.train.steps']),
  ([MOE, '--coordinator=10.0.0.2:8476'], ['--num_processes', 'missing', 'given together']),
  ([MOE, '--process_id=2', '--num_processes=2', '--coordinator=10.0.0.2:8476'], ['--process_id = 2', 'from 0 to 1']),
  ([MOE, '--process_id=0', '--num_processes=2', '--coordinator=here'], ['--coordinator', 'here', 'host:port']),
  ([MOE, '--workdir=gs://bucket/moe'], ['--workdir', 'gs://bucket/moe', "pip install 'efficient_lm[gcs]'"]),
  ([MOE, '--workdir=/dev/null/here'], ['--workdir', '/dev/null', 'is a file']),
  ([MOE, f'--workdir={"x" * 300}'], ['--workdir', 'a name of 300 bytes', '255']),
  ([MOE, f'--workdir={"/".join(["x" * 200] * 25)}'], ['--workdir', 'is a path of']),
  ([MOE, '--workdir=http://x'], ['--workdir', 'is no address of a folder']),
  ([MOE, '--workdir=~nobody_of_that_name/x'], ['--workdir', 'no such user']),
  ([MOE + ':olmoe'], ['olmoe', 'did you mean olmoe_1b_7b?', 'tiny']),
  (['--config=configs/nope.py'], ['--config', 'configs/nope.py', 'no such file']),
  (['--config=/tmp'], ['--config', '/tmp', 'is a folder']),
  (['--config=gone/'], ['--config', 'gone/', 'no such file']),
  ([], ['--config', 'missing', '--config=configs/']),
  (['--config'], ['--config', 'Missing value']),
  ([f'--config={ROOT}/configs/distilled.py'], ['techniques[0].teacher.path', 'runs/baseline', 'make that run first']),
  ([f'--config={ROOT}/configs/upcycled.py'], ['config.start.path', 'runs/baseline', 'make that run first']),
], ids=lambda part: ' '.join(part).replace(str(ROOT) + '/', '')[:60] if isinstance(part, list) else None)
def test_a_mistake_is_answered_shortly_and_leaves_nothing(tmp_path, words, said):
  done, seconds = run(tmp_path, *words)
  assert done.returncode == 2, done.stderr
  assert 1 <= len(done.stderr.splitlines()) <= 2, done.stderr
  for part in said: assert part in done.stderr, done.stderr
  assert not done.stdout and not list(tmp_path.iterdir())
  assert seconds < SECONDS


def test_help_names_the_words(tmp_path):
  done, seconds = run(tmp_path, '--help')
  assert done.returncode == 0 and '--config' in done.stdout and '--workdir' in done.stdout and not done.stderr
  assert seconds < SECONDS


def test_neither_help_nor_a_mistake_loads_jax(tmp_path):
  code = ('import sys\nfrom efficient_lm import commands, main\nsys.argv = ["main", *sys.argv[1:]]\n'
          'code = commands.exit_code(main.main, sys.argv)\n'
          'print(code, sorted({"jax", "jaxlib", "flax", "optax", "orbax", "tensorboardX"} & set(sys.modules)))')
  done = subprocess.run([sys.executable, '-c', code, MOE, '--config.seed=-1'], cwd=tmp_path, capture_output=True,
                        text=True, env={**os.environ, 'PYTHONPATH': str(ROOT)}, check=False)
  assert done.stdout == '2 []\n', done.stdout + done.stderr


def test_a_workdir_of_another_run_is_refused_and_left_alone(tmp_path):
  (tmp_path / 'run').mkdir()
  code = ('import json, sys\nfrom efficient_lm.config import experiment\nloaded, _ = experiment.load(sys.argv[1])\n'
          'json.dump(experiment.to_json(loaded), open("run/config.json", "w"))')
  subprocess.run([sys.executable, '-c', code, f'{ROOT}/configs/baseline.py'], cwd=tmp_path, check=True,
                 env={**os.environ, 'PYTHONPATH': str(ROOT)})
  done, _ = run(tmp_path, MOE, '--workdir=run')
  assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
  assert 'holds another run' in done.stderr and 'SwiGLU' in done.stderr and 'choose another' in done.stderr
  assert [path.name for path in (tmp_path / 'run').iterdir()] == ['config.json']
