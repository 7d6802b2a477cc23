"""What tests of models of others share."""
import os
import pathlib

import pytest

from efficient_lm.interop.gguf.source import file_of


@pytest.fixture(scope='session')
def smollm2() -> str:
  """The folder that `make smollm2` makes. Tests that need it skip where it is not."""
  folder = pathlib.Path(__file__).parent.parent.parent / 'models' / 'smollm2'
  if file_of(str(folder)) is None: pytest.skip('models/smollm2 is not there: make smollm2')
  return str(folder)


@pytest.fixture
def patient():
  """For tests that compute with a real model, a minute and more: EFFICIENT_LM_REAL_MODELS=1 make test ARGS=tests/interop."""
  if not os.environ.get('EFFICIENT_LM_REAL_MODELS'): pytest.skip('takes a minute: EFFICIENT_LM_REAL_MODELS=1 runs it')
