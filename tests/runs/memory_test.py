"""A run that no memory could hold is refused with what it takes and what there is."""
import pathlib

import pytest

from efficient_lm.config import experiment
from efficient_lm.errors import ConfigError
from efficient_lm.runs.run import Run

ROOT = pathlib.Path(__file__).parent.parent.parent


@pytest.mark.parametrize('change, words', [
  ('model.dim=1000000', 'config.model = '), ('model.vocab_size=2000000000', 'config.model = '),
  ('train.batch_size=1000000000', 'config.train.batch_size = 1000000000'),
  ('train.sequence_length=2000000000', 'config.train.sequence_length = 2000000000')])
def test_what_no_memory_holds_is_refused_with_what_it_takes_and_what_there_is(change, words, tmp_path):
  file = str(ROOT / 'configs' / 'baseline.py')
  with pytest.raises(ConfigError) as refused: Run(*experiment.load(file, [f'--config.{change}'], None), tmp_path / 'run')
  said = str(refused.value)
  assert said.startswith(words) and 'is too large' in said and 'iB, and all devices have' in said and '\n' not in said
