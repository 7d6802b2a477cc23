"""Short names: each class that a config can hold has one, and the names of earlier versions are understood."""
import ast
import contextlib
import dataclasses
import os
import pathlib
import sys
import types

import pytest

from efficient_lm.config import experiment, fields, names
from efficient_lm.errors import ConfigError
from efficient_lm.models import zoo
from efficient_lm.techniques import Gptq

ROOT = pathlib.Path(__file__).parent.parent.parent


def test_a_name_is_the_classs_own_and_leads_back_to_it():
  for name, cls in names.own_classes().items(): assert names.name_of(cls) == name and names.class_named(name) is cls


def test_every_dataclass_that_a_config_of_this_tree_can_be_written_with_has_a_name():
  """Those are the dataclasses with a check(), or a base that is one, of the rooms that configs import from."""
  rooms = ('techniques', 'formats', 'data', 'models/spec.py', 'models/moe/routing.py', 'training/optimizers.py',
           'training/train.py', 'config/experiment.py', 'config/mesh.py', 'config/sources.py')
  files = [file for room in rooms for file in ([ROOT / 'efficient_lm' / room] if room.endswith('.py')
                                               else (ROOT / 'efficient_lm' / room).rglob('*.py'))]
  classes = [node for file in files for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.ClassDef)]
  checked = {node.name for node in classes if node.decorator_list and not node.name.startswith('_')
             and any(getattr(one, 'name', '') == 'check' for one in node.body)}
  assert len(checked) > 30 and checked <= set(names.own_classes())


@pytest.mark.parametrize('old, cls', [
  ('efficient_lm.models.spec.Transformer', type(zoo.tiny())), ('efficient_lm.techniques.gptq.Gptq', Gptq),
  ('efficient_lm.experiment.Training', names.own_classes()['Training'])])
def test_names_of_earlier_versions_which_were_those_of_modules_are_understood(old, cls):
  assert names.class_named(old) is cls


def test_a_class_of_a_config_file_is_found_by_its_file_once_that_has_been_read():
  module = types.ModuleType('config_theirs')
  module.__file__ = '/somewhere/theirs.py'
  sys.modules['config_theirs'] = module
  cls = dataclasses.make_dataclass('Own', ['size'])
  cls.__module__ = 'config_theirs'   # Python 3.12 would have overwritten it in the namespace
  assert names.name_of(cls) == 'theirs.py:Own' and names.class_named('theirs.py:Own') is None
  names.remember([cls, int, 3])
  assert names.class_named('theirs.py:Own') is cls is names.class_named('config_theirs.Own')


def test_only_what_a_config_file_has_itself_or_uses_is_found_not_what_it_imports(tmp_path, monkeypatch):
  """A config.json makes objects of this package and of the file that a user gives, of nothing else that is loaded."""
  (tmp_path / 'beside.py').write_text('import dataclasses\n@dataclasses.dataclass\nclass Used: size: int = 1\n'
                                      '@dataclasses.dataclass\nclass Unused: size: int = 1\n')
  (tmp_path / 'theirs_too.py').write_text(
    'import dataclasses\nfrom beside import Unused, Used\nfrom tests.minute import get_config as quick\n'
    '@dataclasses.dataclass\nclass Mine: size: int = 1\n'
    'def get_config(variant=""): return dataclasses.replace(quick(), techniques=(Used(),))\n')
  monkeypatch.syspath_prepend(tmp_path)
  experiment.execute(str(tmp_path / 'theirs_too.py'))
  found = fields.from_json([{'class': 'theirs_too.py:Mine', 'size': 2}, {'class': 'beside.py:Used', 'size': 3}])
  assert [type(one).__name__ for one in found] == ['Mine', 'Used'] and found[0].size == 2
  assert isinstance(fields.from_json({'class': 'beside.py:Unused', 'size': 2}), names.Unread)


def test_no_dataclass_of_any_other_loaded_module_is_made(monkeypatch):
  """By none of the ways in which it could be named."""
  seen = set()
  monkeypatch.setattr(names, '_outside', {})   # of other tests
  for module in list(sys.modules.values()):
    for cls in list(vars(module).values()) if isinstance(module, types.ModuleType) else ():
      if not isinstance(cls, type) or not dataclasses.is_dataclass(cls) or cls in seen: continue
      seen.add(cls)
      if cls.__module__.split('.')[0] == names.PACKAGE: continue
      for name in (cls.__name__, cls.__qualname__, f'{cls.__module__}.{cls.__qualname__}',
                   f'config_{cls.__module__}.{cls.__name__}',
                   f'{os.path.basename(getattr(module, "__file__", None) or "")}:{cls.__qualname__}', names.name_of(cls)):
        if name in names.own_classes(): continue
        with contextlib.suppress(ConfigError): assert type(fields.from_json({'class': name})) is names.Unread
  assert len(seen) > 50


@pytest.mark.parametrize('name', [None, 3, '', 'Any', 'efficient_lm.nowhere.Nothing', 'annotations'])
def test_what_is_no_name_of_a_class_is_refused(name):
  with pytest.raises(ValueError): names.class_named(name)
