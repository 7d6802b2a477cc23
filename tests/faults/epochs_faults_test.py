"""Five interruptions over three epochs, of one, two and four processes: losses and the order of the text are those of a run
that nobody touched. The programs, minutes, only with `--long`."""
import signal

import numpy as np
import pytest

from efficient_lm.data import Corpus, Markov
from tests import starting

# 48 documents of 32 symbols: 48 rows, of which a step takes 8, so that an epoch is 6 steps and three are 18.
LANGUAGE = Markov(alphabet=8, order=1, document_length=32, train_documents=48, heldout_documents=8)
EPOCH, EPOCHS, BATCH, LENGTH = 6, 3, 8, 32
STEPS = EPOCH * EPOCHS
WORDS = ['--config=tests/minute.py:quick', f'--config.train.steps={STEPS}', '--config.data.source.train_documents=48',
         '--config.train.checkpoint_every=3', f'--config.train.eval_every={EPOCH}']
MESHES = {1: [], 2: ['--config.mesh.data=1', '--config.mesh.fsdp=2'],
          4: ['--config.mesh.data=1', '--config.mesh.fsdp=2', '--config.mesh.tensor=2']}
# After so many steps from where it was taken up, which is in each epoch; asked to stop and killed in turn.
INTERRUPTIONS = ((3, 'SIGTERM'), (2, 'SIGKILL'), (3, 'SIGTERM'), (4, 'SIGKILL'), (2, 'SIGTERM'))
FAULT = 'five interruptions over three epochs, 1, 2 and 4 processes'


def batches(processes: int):
  """[process][step] of the training's batches."""
  corpora = [Corpus(source=LANGUAGE, eval_tokens=64).open(seed=3, process_index=i, process_count=processes)
             for i in range(processes)]
  return [corpus.batches(batch_size=BATCH, sequence_length=LENGTH) for corpus in corpora]


@pytest.mark.parametrize('processes', [1, 2, 4])
def test_the_order_of_the_text_is_one_for_any_number_of_processes_from_any_step_on(processes):
  """Every row once an epoch, in another order in each."""
  whole, = batches(1)
  order = []
  for step in range(STEPS):
    parts = [next(iter(part.iterate(step))) for part in batches(processes)]   # as one that is taken up there
    for name in ('inputs_BT', 'targets_BT'):
      np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), whole[step][name])
    order += [bytes(row) for row in whole[step]['inputs_BT'].astype(np.uint8)]
  epochs = [order[i:i + len(order) // EPOCHS] for i in range(0, len(order), len(order) // EPOCHS)]
  assert len(epochs) == EPOCHS and sorted(epochs[0]) == sorted(epochs[1]) == sorted(epochs[2])
  assert len({tuple(epoch) for epoch in epochs}) == EPOCHS


@pytest.fixture(scope='module')
def alone(tmp_path_factory):
  """What one process logs that nobody touches."""
  workdir = tmp_path_factory.mktemp('alone')
  starting.finish(starting.start(workdir, WORDS))
  return starting.logged(workdir)


@pytest.mark.parametrize('processes', [1, 2, 4])
def test_five_interruptions_change_nothing(processes, tmp_path, request, tried):
  if not request.config.getoption('--long'): pytest.skip('needs --long')
  alone, words, count = request.getfixturevalue('alone'), [*WORDS, *MESHES[processes]], 0
  workdir = tmp_path / 'run'
  for steps, name in INTERRUPTIONS:
    variables = {'FAULT_PHASE': 'step', 'FAULT_CALL': f'{steps}', 'FAULT_SIGNAL': name, 'FAULT_NOTE': f'{tmp_path}/note'}
    programs = starting.start(workdir, words, processes, module='tests.faults.interrupting',
                              variables={processes - 1: variables})
    codes, _, said = starting.ends(programs)
    if name == 'SIGTERM': assert set(codes) == {42}, said
    else: assert codes[-1] == -signal.SIGKILL, said
    count += 1
  starting.finish(starting.start(workdir, words, processes))
  found = starting.logged(workdir)
  assert found.keys() == alone.keys() and {step for step, name in found if name == 'loss'} == set(range(1, STEPS + 1))
  if processes == 1: assert found == alone
  # Float32 sums in other orders, 2**-24 apiece, over eighteen steps; a hash of what comes of them is another.
  numbers = {key: value for key, value in alone.items() if not isinstance(value, str)}
  for key, value in numbers.items(): assert found[key] == pytest.approx(value, abs=1e-5, rel=1e-5), key
  tried(FAULT, count, **{'resumed bit for bit' if processes == 1 else 'resumed, losses within 1e-5': count})
