import sys

import pytest

from efficient_lm.lazy import lazy


def test_a_lazy_module_is_imported_when_first_used(tmp_path, monkeypatch):
  (tmp_path / 'imported_late.py').write_text('value = 3')
  monkeypatch.syspath_prepend(str(tmp_path))
  module = lazy('imported_late')
  assert 'imported_late' not in sys.modules
  assert module.value == 3 and 'imported_late' in sys.modules
  with pytest.raises(AttributeError): _ = module.nothing


def test_a_module_that_is_not_there_is_missed_when_used():
  module = lazy('no_such_module_anywhere')
  with pytest.raises(ImportError): _ = module.value
