import subprocess
import sys

import pytest

from efficient_lm import errors
from efficient_lm.lazy import lazy

HEAVY = {'jax', 'flax', 'grain', 'datasets', 'tokenizers', 'pyarrow'}


@pytest.mark.parametrize('work', [
    'pass', 'list(data.Corpus(data.Markov()).check())', 'list(data.Corpus(tokenizer=data.BPE()).check())',
    'list(data.Corpus(data.HuggingFaceDataset("a/b")).check())'])
def test_naming_and_checking_a_corpus_loads_nothing_heavy(work):
  code = f'import sys; from efficient_lm import data, errors, lazy; {work}; print(*sys.modules)'
  command = [sys.executable, '-c', code]
  loaded = subprocess.check_output(command, env={'PYTHONPATH': ':'.join(sys.path)}, text=True)
  assert not HEAVY & set(loaded.split())


def test_a_lazy_module_is_the_module_and_a_missing_one_says_so_when_used():
  assert lazy('json').dumps([1]) == '[1]'
  missing = lazy('no_such_package')
  with pytest.raises(ImportError, match='no_such_package'): _ = missing.anything


def test_a_config_error_is_one_short_line():
  error = errors.ConfigError('model.layers', 'a\nb' * 1000, 'write\na number')
  assert '\n' not in str(error) and len(str(error)) < 200
  assert str(errors.ConfigError('train.steps', -1, 'at least 1')) == 'train.steps = -1: at least 1'
  assert isinstance(error, ValueError) and (error.field, error.fix) == ('model.layers', 'write\na number')
  kinds = (errors.ConfigError, errors.CheckpointError, errors.NonFinite, errors.Preempted)
  assert [kind.exit_code for kind in kinds] == [2, 3, 4, 42]
