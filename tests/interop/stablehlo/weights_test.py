"""Arrays come back bit for bit, whatever their dtype, and by the package of the format too."""
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors

from efficient_lm.interop.stablehlo import run, weights
from efficient_lm.interop.stablehlo.target import array_entry

DTYPES = ('float32', 'float16', 'bfloat16', 'int8', 'uint8', 'int32', 'bool', 'float8_e4m3fn', 'float8_e5m2',
          'float8_e8m0fnu', 'int4', 'uint4', 'float4_e2m1fn', 'float8_e4m3b11fnuz')


def arrays():
  values = np.random.default_rng(0).integers(0, 2, (3, 5))
  return [(f'stacks/0/{dtype}', jnp.asarray(values, dtype)) for dtype in DTYPES] + [
    ('none', jnp.zeros((2, 0, 3))), ('scalar', jnp.float32(2.5))]


def test_arrays_come_back(tmp_path):
  file, named = tmp_path / 'weights.safetensors', arrays()
  kinds = weights.write(str(file), named)
  assert [name for (name, _), kind in zip(named, kinds) if kind == 'U8'] == [f'stacks/0/{dtype}' for dtype in (
    'uint8', 'int4', 'uint4', 'float4_e2m1fn', 'float8_e4m3b11fnuz')]
  found = run.weights(file, {'weights': [array_entry(*entry) for entry in named]})
  for (name, array), back in zip(named, found, strict=True):
    assert (back.dtype, back.shape) == (array.dtype, array.shape), name
    assert back.tobytes() == np.asarray(array).tobytes(), name


def test_the_package_opens_the_file(tmp_path):
  """Its reader is strict: every byte belongs to one tensor."""
  kinds = weights.write(str(tmp_path / 'weights.safetensors'), arrays())
  with safetensors.safe_open(tmp_path / 'weights.safetensors', framework='np') as opened:
    found = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
    assert {name: one.get_dtype() for name, one in found.items()} == dict(zip([name for name, _ in arrays()], kinds))
    assert found['stacks/0/bfloat16'].get_shape() == [3, 5] and found['stacks/0/int4'].get_shape() == [15]
    assert opened.get_tensor('stacks/0/int8').tolist() == np.asarray(dict(arrays())['stacks/0/int8']).tolist()


@pytest.mark.parametrize('name', ['\n', 'ä/"quoted"'])
def test_names_are_any_text(tmp_path, name):
  weights.write(str(tmp_path / 'w'), [(name, jnp.arange(3))])
  assert run.weights(tmp_path / 'w', {'weights': [array_entry(name, jnp.arange(3))]})[0].tolist() == [0, 1, 2]
