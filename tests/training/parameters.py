"""One Variable of each kind that models have, for tests of what moves them."""
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

RATE = 0.125
SHAPES = {   # name: shape, axes, inputs
  'matrix': ((8, 16), 'DF', 'D'), 'layers': ((2, 8, 16), 'DF', 'D'), 'experts': ((2, 3, 8, 16), 'EDF', 'D'),
  'heads': ((8, 2, 6), 'DNH', 'D'), 'merged': ((2, 6, 8), 'NHD', 'NH'), 'embedding': ((12, 8), 'VD', 'D'),
  'positions': ((9, 8), 'TD', 'D'), 'head': ((8, 12), 'DV', 'D'), 'router': ((8, 3), 'DE', 'D'), 'norm': ((8,), 'D', ''),
  'head norm': ((2, 6), 'NH', ''),
}
VECTORS = {'norm', 'head norm', 'bias'}
OF_ADAM = {'embedding', 'positions', 'head', 'router'}   # matrices that Muon leaves to AdamW


def variables(seed):
  """A tree of them with random numbers."""
  rng = np.random.default_rng(seed)
  tree = {name: nnx.Param(jnp.asarray(rng.normal(size=shape), jnp.float32), axes=axes,
                          **(dict(inputs=inputs) if inputs else {})) for name, (shape, axes, inputs) in SHAPES.items()}
  tree['bias'] = nnx.Param(jnp.asarray(rng.normal(size=3), jnp.float32), axes='E', rate=RATE)
  return tree


def zeros(tree):
  """The same tree of zeros."""
  return jax.tree.map(np.zeros_like, tree)


def values(tree):
  """Its arrays, by name."""
  return {name: np.asarray(leaf.get_value()) for name, leaf in tree.items()}


def assert_same_bits(a, b):
  """Of two trees."""
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True): np.testing.assert_array_equal(x, y)
