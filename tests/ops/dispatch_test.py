"""'auto' depends on the device and the arguments; a named implementation runs or is refused in a sentence."""
import jax
import pytest
from jax.sharding import AbstractMesh, AxisType

from efficient_lm.ops.dispatch import Device, Implementation, device, portable, prefer, run

WAYS = {
  'hopper': Implementation(lambda x: 'hopper', on=('hopper',), refuses=lambda x: '' if x % 2 == 0 else 'x is odd'),
  'tpu first': Implementation(lambda x: 'tpu first', auto=('tpu',)),
  'any': Implementation(lambda x: 'any'),
  'never by itself': Implementation(lambda x: 'never by itself', auto=()),
}


def on(monkeypatch, platform: str, kind: str):
  monkeypatch.setattr('efficient_lm.ops.dispatch.device', lambda: Device(platform, kind))


@pytest.mark.parametrize(('platform', 'kind', 'x', 'chosen'), [
  ('gpu', 'NVIDIA H200', 2, 'hopper'), ('gpu', 'NVIDIA H200', 3, 'any'), ('gpu', 'NVIDIA A100', 2, 'any'),
  ('tpu', 'TPU v6 lite', 2, 'tpu first'), ('cpu', 'cpu', 2, 'any')])
def test_auto_takes_the_first_that_suits(monkeypatch, platform, kind, x, chosen):
  on(monkeypatch, platform, kind)
  assert run('op', WAYS, 'auto', x) == chosen


def test_a_named_implementation_is_the_one_that_runs(monkeypatch):
  on(monkeypatch, 'cpu', 'cpu')
  assert [run('op', WAYS, name, 2) for name in list(WAYS)[1:]] == list(WAYS)[1:]


@pytest.mark.parametrize(('kind', 'x', 'message'), [
  ('NVIDIA A100', 2, "'hopper' is for hopper, but the device is a NVIDIA A100"), ('NVIDIA H100 PCIe', 3, 'x is odd')])
def test_what_cannot_run_is_refused_and_nothing_takes_its_place(monkeypatch, kind, x, message):
  on(monkeypatch, 'gpu', kind)
  with pytest.raises(ValueError, match=message): run('op', WAYS, 'hopper', x)


def test_an_unknown_name_is_refused_with_the_choices():
  with pytest.raises(ValueError, match=r"no implementation 'cuda': choose 'auto' or one of \['any', "):
    run('op', WAYS, 'cuda', 2)


def test_the_device_is_that_of_the_mesh_in_force():
  assert device().platform == jax.default_backend()
  from jax.sharding import AbstractDevice
  there = AbstractMesh((2,), ('data',), (AxisType.Auto,), abstract_device=AbstractDevice('NVIDIA H200', 132, 'cuda'))
  with jax.sharding.use_abstract_mesh(there):
    assert device() == Device('gpu', 'NVIDIA H200', 132)


def test_a_preference_changes_what_auto_means_and_compiled_functions_notice(monkeypatch):
  on(monkeypatch, 'cpu', 'cpu')
  ways = {'twice': Implementation(lambda x: 2 * x), 'thrice': Implementation(lambda x: 3 * x, auto=())}
  compiled = jax.jit(lambda x: run('op', ways, 'auto', x) + run('other', ways, 'auto', 100 * x))
  assert compiled(1) == 202
  with prefer(op='thrice'):
    assert compiled(1) == 203
    with prefer(other='thrice'): assert compiled(1) == 303
    assert run('op', ways, 'twice', 1) == 2   # a preference does not overrule a name
  assert compiled(1) == 202


def test_a_preference_that_cannot_run_is_refused(monkeypatch):
  on(monkeypatch, 'gpu', 'NVIDIA A100')
  with prefer(op='hopper'), pytest.raises(ValueError, match="'hopper' is for hopper"): run('op', WAYS, 'auto', 2)


@pytest.mark.parametrize('platform', ['cpu', 'tpu'])
def test_a_portable_program_takes_what_runs_everywhere(monkeypatch, platform):
  """Whatever is here; and a function that was compiled for the device here is not taken."""
  here = jax.devices()[0]
  monkeypatch.setattr(jax, 'devices', lambda: [type('There', (), {'platform': platform, 'device_kind': here.device_kind})])
  ways = {'local': Implementation(lambda x: 2 * x, auto=(platform,)), 'all': Implementation(lambda x: 3 * x)}
  compiled = jax.jit(lambda x: run('op', ways, 'auto', x))
  assert compiled(1) == 2
  with portable():
    assert compiled(1) == 3
    assert device().may_be_cpu
    with pytest.raises(ValueError, match='the device is a device of any kind'): run('op', WAYS, 'hopper', 2)
  assert compiled(1) == 2 and device().may_be_cpu == (platform == 'cpu')
