"""Pack: the same model in fewer bytes, in memory and on disk, which later stages take as they take masked weights."""
import contextlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_lm.errors import IncompatibleError
from efficient_lm.formats import Int
from efficient_lm.runs import invariants, structure
from efficient_lm.runs.checkpoint import Checkpoints
from efficient_lm.techniques import Gptq, NofM, Pack, PruneOnce, Quantize, Rule
from efficient_lm.tree import num_bytes, select
from efficient_lm.weights.packed_masked import PackedMasked
from efficient_lm.weights.quantized import Quantized
from efficient_lm.weights.weight import Dense
from tests.compressing import Context, abstractly, logits_of, model_of

pytestmark = pytest.mark.usefixtures('quick_compilation')


def pruned(mlp='dense', **fields):
  return PruneOnce(**(fields or {'sparsity': 0.5}))(model_of(mlp=mlp), Context())[0]


def on_disk(model, folder) -> int:
  with contextlib.closing(Checkpoints(folder, keep=1)) as checkpoints:
    checkpoints.save(0, {'model': model}, wait=True)
    again = checkpoints.restore(jax.eval_shape(lambda: {'model': model}))
  for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(model), strict=True): np.testing.assert_array_equal(a, b)
  return sum(file.stat().st_size for file in folder.rglob('*') if file.is_file())


@pytest.mark.thinned
@pytest.mark.parametrize('mlp', ['dense', 'experts'])
@pytest.mark.parametrize('fields', [{'sparsity': 0.5}, {'pattern': NofM()}], ids=['half', '2:4'])
def test_it_is_the_same_model_in_fewer_bytes(mlp, fields):
  model = pruned(mlp, **fields)
  small, (note,) = Pack()(model, Context())
  assert len(dict(select(small, PackedMasked))) == (7 if mlp == 'dense' else 10)
  np.testing.assert_allclose(logits_of(small), logits_of(model), rtol=1e-5, atol=1e-5)   # two programs
  assert invariants.check(invariants.read(model), small, Pack()) == []
  assert num_bytes(small) < num_bytes(model_of(mlp=mlp)) < num_bytes(model)
  assert note.startswith(f'Pack: {7 if mlp == "dense" else 10} masked weights in 4')   # 2 + 1/8 (2:4: 2 + 1/8) of 5 bytes
  abstractly(Pack(), model)


def test_a_checkpoint_is_smaller_on_disk_and_is_read_back(tmp_path):
  """Numbers that no compression makes smaller, as those of trained models are."""
  dense = {'up': Dense(jnp.asarray(np.random.default_rng(0).normal(size=(1024, 1024)), jnp.float32), 'DF', 'D')}
  masked, _ = PruneOnce(sparsity=0.5, where='up')(dense, Context())
  small, _ = Pack()(masked, Context())
  sizes = [on_disk(model, tmp_path / str(i)) for i, model in enumerate((dense, masked, small))]
  assert sizes[2] < 0.56 * sizes[0] and sizes[2] < sizes[1], sizes


def test_its_structure_is_described_and_rebuilt():
  small, _ = Pack()(pruned(pattern=NofM()), Context())
  again = structure.rebuilt(json.loads(json.dumps(structure.described(small))))
  assert jax.tree.structure(again) == jax.tree.structure(jax.eval_shape(lambda: small))


def test_later_stages_take_it_as_masked():
  small, _ = Pack()(pruned(pattern=NofM()), Context())
  stored, _ = Quantize(rules=(Rule(weights=Int(bits=4)),), method=Gptq(block=8), sequences=8, least_tokens=1)(
    small, Context())
  assert invariants.check(invariants.read(small), stored, Quantize()) == []
  assert len(dict(select(stored, Quantized))) == 7
  more, _ = PruneOnce(sparsity=0.75)(small, Context())
  assert invariants.check(invariants.read(small), more, PruneOnce(sparsity=0.75)) == []


def test_a_model_without_masks_is_refused():
  with pytest.raises(IncompatibleError, match="Pack: no float weight on a path that matches 'up' is masked: prune first"):
    Pack(where='up')(model_of(), Context())
  assert [name for name, _, _ in Pack(where='(').check()] == ['where']
