"""Eight virtual CPU devices for every test, and one cache of compiled programs for all processes that test; both are read
when JAX starts."""
import os
import pathlib
import signal
import sys

os.environ['XLA_FLAGS'] = os.environ.get('XLA_FLAGS', '') + ' --xla_force_host_platform_device_count=8'
# Half of a test's time is compiling. Programs that take less than this to compile are not worth a file.
os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', str(pathlib.Path(__file__).parent.parent / '.pytest_cache' / 'compiled'))
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0.2')
os.environ.setdefault('JAX_COMPILATION_CACHE_MAX_SIZE', str(4 << 30))   # bytes; the oldest go

import pytest


def pytest_addoption(parser):
  parser.addoption('--kills', type=int, default=2, help='how many times tests/faults kills a recipe of stages')
  parser.addoption('--long', action='store_true', help='all cases, those too that tests/long.py leaves out')
  parser.addoption('--tried', metavar='FOLDER', type=os.path.abspath,   # tests go elsewhere
                   help='where tests of faults leave a record of what they have tried')


def pytest_configure(config):
  config.addinivalue_line('markers', 'thinned: of its cases `make test` runs some, see tests/long.py')
  config.addinivalue_line('markers', 'fault(name, outcome): each case is a try of that fault; see tests/tried.py')


def pytest_collection_modifyitems(config, items):
  """Leaves out what is long, unless it is asked for."""
  if config.getoption('--long'): return
  from tests import long
  items[:], left = long.split(items)
  config.hook.pytest_deselected(items=left)


@pytest.fixture
def hears_hangup():
  """SIGHUP does what it does to a program, and to those that it starts, also where the tests run under `nohup`."""
  before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
  yield
  signal.signal(signal.SIGHUP, before)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
  """Records the cases of tests with the marker `fault`."""
  from tests import tried
  report = yield
  for fault in tried.of_case(report, item.iter_markers('fault'), 'tried' in item.fixturenames):
    tried.Records(item.config.getoption(tried.OPTION)).add(*fault, item.nodeid)
  return report


@pytest.fixture
def tried(request):
  """tried(fault, tries, outcome=count …): records what a test has tried, once it has come to its end."""
  from tests import tried
  records = tried.Records(request.config.getoption(tried.OPTION))
  return lambda fault, tries, /, **outcomes: records.add(
    fault, tries, {name.replace('_', ' '): count for name, count in outcomes.items()}, request.node.nodeid)


@pytest.fixture(scope='module', autouse=True)
def forgotten():
  """Programs of one file are of no use to the next. Each compiled one maps some memory, of which a process may have 65530
  pieces on Linux by default; XLA aborts where it gets no more."""
  yield
  if 'jax' in sys.modules: sys.modules['jax'].clear_caches()
  assert not signal.pthread_sigmask(signal.SIG_BLOCK, ()), 'programs that are started next would not hear signals'


@pytest.fixture(scope='module')
def quick_compilation():
  """For tests that spend nearly all their time on compiling, and state what holds of any program."""
  import jax
  jax.config.update('jax_disable_most_optimizations', True)
  yield
  jax.config.update('jax_disable_most_optimizations', False)


@pytest.fixture(scope='module')
def quick_unless_long(request):
  """Of `make test` alone: `make test-long` compiles these tests as users' programs are."""
  if not request.config.getoption('--long'): request.getfixturevalue('quick_compilation')


@pytest.fixture(scope='module')
def one_device():
  """Every mesh has one device, whose programs compile faster: that meshes change nothing is tested elsewhere."""
  import jax

  from efficient_lm.config.mesh import Mesh
  build = Mesh.build
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(Mesh, 'build', lambda self, devices=None: build(self, (devices or jax.devices())[:1]))
    yield


@pytest.fixture
def mesh():
  """mesh(data, fsdp, expert, tensor): a context in which that mesh over eight devices is in force."""
  import jax

  from efficient_lm import axes
  from efficient_lm.config.mesh import Mesh
  if jax.device_count() != 8: pytest.skip('needs eight devices: run the tests on CPU')
  return lambda *sizes: jax.set_mesh(Mesh(**dict(zip(axes.MESH, sizes, strict=True))).build())
