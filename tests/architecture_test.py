"""The laws of the code base that a program can check. See the module's name in a message: that is the file to mend."""
import ast
import graphlib
import pathlib
import subprocess
import sys
from collections.abc import Iterator

import pytest

ROOT = pathlib.Path(__file__).parent.parent
FILES = {str(file.relative_to(ROOT)): ast.parse(file.read_text()) for folder in ('efficient_lm', 'configs')
         for file in sorted((ROOT / folder).rglob('*.py'))}
PACKAGE = [name for name in FILES if name.startswith('efficient_lm/') and name != 'efficient_lm/__init__.py']
TECHNIQUES = [name for name in PACKAGE if name.startswith('efficient_lm/techniques/') and '__init__' not in name]

# A module imports from its own floor and those below. Every room and every module at the root is named here.
FLOORS = (
  'axes tree errors lazy system',
  'ops formats',
  'weights parallel',
  'models',
  'training compression',
  'techniques',
  'data interop',
  'config runs',
  'commands main generate evaluate lm_eval sensitivity export report bench benches',
)
FLOOR = {name: floor for floor, names in enumerate(FLOORS) for name in names.split()}
# Tested through others, because they only hold, draw or combine: a reason each.
WITHOUT_OWN_TEST = {
  'efficient_lm/compression/counting.py': 'runs/measure_test',
  'efficient_lm/compression/importance.py': 'scores_test',
  'efficient_lm/compression/latency.py': 'budget_test',
  'efficient_lm/compression/merged_experts.py': 'merging_test',
  'efficient_lm/runs/console.py': 'prints; seen in run_test',
  'efficient_lm/runs/monitor.py': 'what a run shows while it trains; run_test and resume_test',
  'efficient_lm/runs/report_page.py': 'draws; report_test',
  'efficient_lm/runs/results.py': 'report_test, which reads many folders',
  'efficient_lm/interop/imported.py': 'huggingface_test, gguf/source_test',
  'efficient_lm/interop/checkpoint.py': 'holds; load_test',
  'efficient_lm/interop/gguf/engine.py': 'llama_cpp_test, which needs llama.cpp as it does',
  'efficient_lm/interop/written.py': 'holds; write_test',
  'efficient_lm/interop/harness.py': 'lm_eval_test, beside the command that is all it is for',
  **{f'efficient_lm/interop/families/{name}.py': 'families_test, against transformers' for name in (
    '__init__', 'configs', 'deepseek', 'gemma', 'gpt', 'keys', 'llama', 'mixtures', 'places', 'rotary')},
  'efficient_lm/benches/blocks.py': 'bench_test',
  'efficient_lm/benches/ceilings.py': 'op_bench_test',
  'efficient_lm/benches/few_bits.py': 'bench_test',
  'efficient_lm/benches/loading.py': 'bench_test',
  'efficient_lm/benches/libraries.py': 'op_bench_test',
  'efficient_lm/benches/models.py': 'bench_test',
  'efficient_lm/benches/op_report.py': 'op_bench_test',
  'efficient_lm/benches/op_speed.py': 'op_bench_test',
  'efficient_lm/benches/ops.py': 'op_bench_test',
  'efficient_lm/benches/result.py': 'bench_test',
  'efficient_lm/benches/tile_spaces.py': 'op_bench_test',
  'efficient_lm/benches/timer.py': 'op_bench_test',
  'efficient_lm/benches/torch_models.py': 'bench_test',
  'efficient_lm/benches/tuning.py': 'op_bench_test',
}


def imports(tree) -> Iterator[str]:
  """Dotted names of all that a module imports, lazily too: `lazy('x')` only postpones an import."""
  for node in ast.walk(tree):
    if isinstance(node, ast.Import): yield from (name.name for name in node.names)
    elif isinstance(node, ast.ImportFrom): yield from (f'{node.module}.{name.name}' for name in node.names)
    elif isinstance(node, ast.Call) and getattr(node.func, 'id', '') == 'lazy': yield node.args[0].value


def inner_imports(name: str) -> list[str]:
  return [found for found in imports(FILES[name]) if found.split('.')[0] == 'efficient_lm' and '.' in found]


def floor(module: str) -> int:
  """Of 'efficient_lm.models.spec' or 'efficient_lm/models/spec.py'."""
  return FLOOR[module.removesuffix('.py').replace('/', '.').removesuffix('.__init__').split('.')[1]]


@pytest.mark.parametrize('name', PACKAGE)
def test_imports_go_down_only(name):
  up = [found for found in inner_imports(name) if floor(found) > floor(name)]
  assert not up, f'{name} (floor {floor(name)}) imports {up}'


def module_of(found: str) -> str:
  """'efficient_lm.models.spec.Transformer' -> 'efficient_lm/models/spec.py', the file in which an import is answered."""
  path = pathlib.Path(*found.split('.'))
  candidates = (str(known) for part in (path, *path.parents) for known in (part.with_suffix('.py'), part / '__init__.py'))
  return next(known for known in candidates if known in FILES)


@pytest.mark.parametrize('place', [str, lambda name: name.split('/')[1]], ids=['modules', 'rooms'])
def test_no_import_leads_back(place):
  """Neither from module to module nor from room to room, and an import inside a function is one too."""
  graph = graphlib.TopologicalSorter()
  for name in PACKAGE:
    graph.add(place(name), *({place(module_of(found)) for found in inner_imports(name)} - {place(name)}))
  graph.prepare()   # CycleError names the cycle


@pytest.mark.parametrize('name', PACKAGE)
def test_only_libraries_are_lazy(name):
  """Of our own a reader can go to the definition: what computes is imported in the function that begins to compute."""
  calls = [node for node in ast.walk(FILES[name]) if isinstance(node, ast.Call) and getattr(node.func, 'id', '') == 'lazy']
  assert not [call for call in calls if call.args[0].value.startswith('efficient_lm')]


@pytest.mark.parametrize('name', PACKAGE)
def test_nothing_is_imported_relatively(name):
  assert not [node.module for node in ast.walk(FILES[name]) if isinstance(node, ast.ImportFrom) and node.level]


@pytest.mark.parametrize('name', TECHNIQUES)
def test_techniques_never_import_each_other(name):
  """They meet in `compression`."""
  assert not [found for found in inner_imports(name) if '.techniques.' in found]


@pytest.mark.parametrize('name', [
  name for name in PACKAGE if name.startswith(('efficient_lm/training/', 'efficient_lm/models/'))])
def test_trainer_and_models_know_no_technique(name):
  assert not [found for found in inner_imports(name) if '.techniques' in found]


@pytest.mark.parametrize('name', [name for name in PACKAGE if name.startswith('efficient_lm/ops/')])
def test_ops_know_arrays_only(name):
  foreign = {found.split('.')[0] for found in imports(FILES[name])} - set(sys.stdlib_module_names)
  assert foreign <= {'jax', 'numpy', 'efficient_lm'}
  assert all(found.startswith('efficient_lm.ops') for found in inner_imports(name))


@pytest.mark.parametrize('name', FILES)
def test_files_and_functions_are_short(name):
  limit = 600 if '/ops/' in name else 400
  assert len((ROOT / name).read_text().splitlines()) <= limit
  long = [node.name for node in ast.walk(FILES[name]) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
          and node.end_lineno - node.lineno >= 50]
  assert not long, f'longer than 50 lines: {long}'


def class_fields(node: ast.ClassDef) -> int:
  """Fields of a dataclass, or arguments of a constructor without self."""
  decorators = [ast.unparse(decorator) for decorator in node.decorator_list]
  if any('dataclass' in decorator or decorator == 'config' for decorator in decorators):
    return sum(isinstance(line, ast.AnnAssign) for line in node.body)
  constructors = [line.args for line in node.body if isinstance(line, ast.FunctionDef) and line.name == '__init__']
  return max((len(args.args) + len(args.kwonlyargs) - 1 for args in constructors), default=0)


# What published models differ in, each a fact of one of them, that is neutral by default; and how often a training does each
# of four things; and when a training prunes, by what, where and how much of each.
WIDE = {'efficient_lm/models/spec.py': {'GroupedQuery': 9}, 'efficient_lm/training/train.py': {'Training': 9},
        'efficient_lm/techniques/pruning/prune.py': {'Prune': 9}}


@pytest.mark.parametrize('name', PACKAGE)
def test_no_class_has_more_than_eight_fields(name):
  wide = {node.name: class_fields(node) for node in ast.walk(FILES[name])
          if isinstance(node, ast.ClassDef) and class_fields(node) > 8}
  assert wide == WIDE.get(name, {})


def test_names_say_what_a_file_holds():
  vague = {'utils', 'util', 'common', 'misc', 'helpers', 'helper', 'base', 'stuff', 'v2'}
  assert not [name for name in FILES if vague & set(pathlib.Path(name).stem.split('_'))]


@pytest.mark.parametrize('name', PACKAGE)
def test_what_is_public_has_a_docstring(name):
  tree = FILES[name]
  bare = [node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))
          and not node.name.startswith('_') and not ast.get_docstring(node)]
  assert not bare, f'{name}: {bare}'
  empty = not tree.body
  assert empty or ast.get_docstring(tree), f'{name} does not say what it is'


# Calls that run or unpickle what they read. `spec.loader.exec_module` in experiment.py reads the user's own --config.
DANGEROUS_CALLS = {'eval', 'exec', 'compile', '__import__', 'pickle.load', 'pickle.loads', 'torch.load', 'joblib.load',
                   'dill.load', 'dill.loads', 'yaml.load', 'os.system', 'marshal.loads', 'shelve.open'}
DANGEROUS_WORDS = {'allow_pickle', 'trust_remote_code', 'shell'}


@pytest.mark.parametrize('name', FILES)
def test_nothing_that_is_read_is_executed(name):
  calls = [node for node in ast.walk(FILES[name]) if isinstance(node, ast.Call)]
  assert not [ast.unparse(call.func) for call in calls if ast.unparse(call.func) in DANGEROUS_CALLS]
  words = [word for call in calls for word in call.keywords if word.arg in DANGEROUS_WORDS]
  assert not [word.arg for word in words if ast.unparse(word.value) != 'False']
  assert not [found for found in imports(FILES[name]) if found.split('.')[0] in ('pickle', 'dill', 'marshal', 'shelve')]
  loaders = [call for call in calls if ast.unparse(call.func).endswith(('.exec_module', '.run_path', '.load_module'))]
  assert len(loaders) == (name == 'efficient_lm/config/experiment.py')


def own_test(name: str) -> pathlib.Path:
  """efficient_lm/a/b.py -> tests/a/b_test.py; an op is tested as one: ops/<op>/*.py -> tests/ops/<op>_test.py."""
  path = pathlib.Path(name).relative_to('efficient_lm').with_suffix('')
  if path.parts[0] == 'ops' and len(path.parts) > 2: path = path.parent
  return ROOT / 'tests' / path.with_name(path.name + '_test.py')


@pytest.mark.parametrize('name', [name for name in PACKAGE if any(
  isinstance(node, (ast.FunctionDef, ast.ClassDef)) for node in FILES[name].body)])
def test_tests_mirror_sources(name):
  if name in WITHOUT_OWN_TEST: assert not own_test(name).is_file(), f'{name} has a test: take it off the list'
  else: assert own_test(name).is_file(), f'{own_test(name).relative_to(ROOT)} is missing'


LIGHT = [name.removesuffix('.py').replace('/', '.') for name in (
  'efficient_lm', 'efficient_lm/config/experiment', 'efficient_lm/commands', 'efficient_lm/main', 'efficient_lm/models/zoo',
  'efficient_lm/data', 'efficient_lm/training/optimizers', 'efficient_lm/techniques', *TECHNIQUES,
  *(name for name in FILES if name.startswith('configs/')))]


def test_reading_a_config_loads_neither_jax_nor_flax():
  """One process for all: whoever loads it is found by running this list by hand."""
  code = ('import importlib, sys\n'
          'for name in sys.argv[1:]:\n'
          '  importlib.import_module(name)\n'
          '  heavy = {"jax", "flax", "optax", "orbax", "torch", "tensorboardX", "matplotlib"} & set(sys.modules)\n'
          '  if heavy: sys.exit(f"{name} loads {sorted(heavy)}")')
  done = subprocess.run([sys.executable, '-c', code, *LIGHT], cwd=ROOT, capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr
