"""What is exported runs with jax and numpy alone, and gives the numbers of the model."""
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from efficient_lm.interop.stablehlo import run
from efficient_lm.interop.stablehlo.target import StableHlo
from efficient_lm.models import decode
from efficient_lm.models.spec import FloatCache, IntegerCache
from tests.interop.stablehlo.models import INT4, TOKENIZER, drawn

LENGTH, STEPS = 24, 3
MODELS = {'experts': (('experts',), FloatCache()), 'int4, int8 cache': (('dense', INT4), IntegerCache(bits=8)),
          'dense': (('dense',), FloatCache())}
TOKENS = np.random.default_rng(1).integers(0, TOKENIZER.vocab_size, (3, 7 + STEPS)).astype(np.int32)
BATCHES = {'one': [7], 'three': [7, 2, 5]}   # the lengths of their prompts
# Loads what is in a folder where neither this package nor flax can be imported, saves logits, and runs the command.
ALONE = """
import json, sys
sys.modules.update({'flax': None, 'efficient_lm': None, 'optax': None})
import numpy as np
target, batches, *folders = sys.argv[1:]
tokens = np.load(target + '/tokens.npy')
for i, folder in enumerate(folders):
  sys.path.insert(0, folder)
  sys.modules.pop('run', None)
  import run
  assert run.__file__ == folder + '/run.py'
  model = run.Model(folder)
  for name, lengths in json.loads(batches).items():
    B, lengths = len(lengths), np.array(lengths)
    logits, cache = model.prefill(tokens[:B, :7], lengths)
    found = [logits]
    for step, token in enumerate(tokens[:B, 7:].T):
      logits, cache = model.decode(token, lengths + step, cache)
      found.append(logits)
    np.save(f'{target}/{i} {name}.npy', np.stack(found))
sys.argv = ['run.py', '1,2,3', '4,5', '--tokens=5']
run.main()
assert not {name.split('.')[0] for name, module in sys.modules.items() if module} & {'flax', 'efficient_lm'}
"""


@pytest.fixture(scope='module')
def exported(tmp_path_factory):
  """A folder with those of the models, and with the logits and text that a process of its own made of them."""
  top = tmp_path_factory.mktemp('exported')
  folders = [str(top / str(i)) for i in range(len(MODELS))]
  for folder, (kind, cache) in zip(folders, MODELS.values()):
    os.mkdir(folder)
    StableHlo(length=LENGTH, cache=cache).write(drawn(*kind), TOKENIZER, folder)
  np.save(top / 'tokens.npy', TOKENS)
  # -I: neither PYTHONPATH nor the working directory are places to import from.
  done = subprocess.run([sys.executable, '-I', '-c', ALONE, str(top), json.dumps(BATCHES), *folders], capture_output=True,
                        text=True, check=False, env={**os.environ, 'JAX_PLATFORMS': 'cpu'})
  assert done.returncode == 0, done.stderr
  (top / 'drawn').write_text(done.stdout)
  return top


def own_logits(model, cache, lengths):
  """(STEPS + 1, B, V): after the prompts and each token behind them, by this package."""
  B, lengths_B = len(lengths), jnp.array(lengths, jnp.int32)
  logits, slots = decode.prefill(model, TOKENS[:B, :7], lengths_B, length=LENGTH, cache=cache,
                                 vocab_size=TOKENIZER.vocab_size)
  found, step = [logits], jax.jit(lambda model, ids, starts, slots: model(ids, cache=slots, start=starts))
  for i in range(STEPS):
    outputs = step(model, TOKENS[:B, 7 + i, None], lengths_B + i, slots)
    found.append(outputs.logits_BTV[:, 0, :TOKENIZER.vocab_size])
    slots = outputs.cache
  return np.stack(found)


@pytest.mark.thinned
@pytest.mark.parametrize('name', MODELS)
def test_logits_are_those_of_the_model(exported, name):
  """For one sequence and three from the same file, prompts of several lengths among them. Both add up sums of at most 48
  float32 products, in an order of their own, in about ten successive products."""
  kind, cache = MODELS[name]
  for batch, lengths in BATCHES.items():
    found, own = np.load(exported / f'{[*MODELS].index(name)} {batch}.npy'), own_logits(drawn(*kind), cache, lengths)
    np.testing.assert_allclose(found, own, rtol=0, atol=2e-6 * np.abs(own).max(), err_msg=batch)


def test_the_command_draws_what_the_model_finds_most_likely(exported):
  ids = np.concatenate([*decode.stream(drawn('dense'), [[1, 2, 3], [4, 5]], 5, sampling=decode.Sampling(0.0),
                                       vocab_size=TOKENIZER.vocab_size)], 1)
  assert (exported / 'drawn').read_text() == ''.join(','.join(map(str, row)) + '\n' for row in ids.tolist())


def test_what_the_cache_has_no_room_for_is_refused(exported):
  model = run.Model(exported / '0')
  with pytest.raises(ValueError, match=f'{LENGTH + 1} tokens'): model.prefill(np.zeros((1, LENGTH + 1)), [LENGTH + 1])
  with pytest.raises(ValueError, match=f'token {LENGTH}'): model.decode([0], [LENGTH], [])
  with pytest.raises(ValueError, match='empty'): model.greedy([[1], []], 2)
  with pytest.raises(ValueError, match=r'3 \+ 22'): model.greedy([[1, 2, 3]], LENGTH - 2)


def test_the_program_itself_refuses_a_longer_prompt(exported):
  """Whoever calls it: its shapes are asserted in it."""
  program = export.deserialize(bytearray((exported / '0' / 'prefill.stablehlo').read_bytes()))
  weights = run.weights(exported / '0' / 'weights.safetensors', json.loads((exported / '0' / 'manifest.json').read_text()))
  longer = jax.jit(program.call).lower(*weights, jnp.zeros((1, LENGTH + 1), jnp.int32), jnp.ones(1, jnp.int32))
  with pytest.raises(ValueError, match='shapes'): longer.compile()


def test_ids_end_before_a_stop(exported):
  model = run.Model(exported / '0')
  model.manifest['stops'] = [3, 9]
  model._prefill = lambda *_: (jax.nn.one_hot(jnp.array([4, 5]), 10),)
  model._decode = lambda *arrays: (jax.nn.one_hot(arrays[-2] + jnp.array([0, 2]), 10),)
  assert model.greedy([[1, 2], [3]], 5) == [[4] * 5, [5, 7]]
