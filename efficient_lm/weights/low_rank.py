"""LowRank: a weight plus a product of two thin matrices, which are trained in its place."""
import jax
import jax.numpy as jnp
from flax import nnx

from efficient_lm import tree
from efficient_lm.ops.contract import contract
from efficient_lm.ops.grouped_matmul import grouped_matmul
from efficient_lm.weights.layout import Layout
from efficient_lm.weights.weight import Dense, Frozen, OutputsFirst, Weight, Wrapper

LETTERS = ('axes', 'inputs')   # of what a Variable has beside its array


class Held(Frozen):
  """A parameter that one training leaves as it is, and the next one need not."""


class LowRank(Wrapper):
  """inner + scale * down @ up, the adapter of LoRA (Hu et al. 2021, arXiv 2106.09685, eq. 3); P is its rank.

  down: (inputs, P) and up: (P, outputs), of each layer and expert. A product with few rows passes through them one after the
  other, beside that of `inner`, which may be stored in few bits. Under a mask, which stands around it, the sum is masked.
  """

  def __init__(self, inner: Weight, down, up, scale: float):
    layout = Layout.of(inner)
    self.inner, self.scale = inner, scale
    self.down = _param(down, f'{layout.experts}{inner.inputs}P', inner.inputs)
    self.up = _param(up, f'{layout.experts}P{layout.outputs}', 'P')

  @property
  def rank(self) -> int: return self.down.get_value().shape[-1]

  @property
  def num_multiplied(self):
    return self.inner.num_multiplied + self.down.get_value().size + self.up.get_value().size

  @property
  def kind(self): return f'{self.inner.kind} + rank {self.rank}'

  def around(self, change) -> 'LowRank':
    """With change(inner) in place of `inner`, and the same adapter."""
    return LowRank(change(self.inner), self.down, self.up, self.scale)

  def materialize(self):
    down, up = self.down, self.up
    equation = f'...{down.get_metadata()["axes"]},...{up.get_metadata()["axes"]}->...{self.axes}'
    array = self.inner.materialize()
    return array + (self.scale * jnp.einsum(equation, down.get_value(), up.get_value())).astype(array.dtype)

  def merged(self) -> Dense:
    """One matrix with the values of the sum."""
    if isinstance(self.inner, Dense): return self.inner.replaced(self.materialize())
    return Dense(self.materialize(), self.axes, self.inputs)

  def invariants(self):
    return tuple(one for one in self.inner.invariants() if one.kind not in ('zeros', 'pattern'))   # those of a mask around

  def cast(self, dtype):
    variables = (variable.replace(variable.get_value().astype(dtype)) for variable in (self.down, self.up))
    return LowRank(self.inner.cast(dtype), *variables, self.scale)

  def for_decoding(self):
    """Of floats, one matrix; of others, their own form beside the adapter."""
    if isinstance(self.inner, Dense) and self.axes[0] not in 'VT': return jax.jit(OutputsFirst)(self)
    return self.around(lambda inner: inner.for_decoding())

  def contract(self, equation: str, x, dtype=None):
    (x_axes, rest), result = equation.split('->')[0].split(','), equation.split('->')[1]
    if not x_axes.endswith(self.inputs) or rest != self.axes: return super().contract(equation, x, dtype)
    down, up = (variable.get_value().astype(x.dtype) for variable in (self.down, self.up))
    letters = self.down.get_metadata()['axes'], self.up.get_metadata()['axes']
    thin = x_axes.removesuffix(self.inputs) + 'P'
    added = contract(f'{thin},{letters[1]}->{result}', contract(f'{x_axes},{letters[0]}->{thin}', x, down), up, dtype=dtype)
    return self.inner.contract(equation, x, dtype) + self.scale * added

  def contract_grouped(self, x_MD, sizes_E):
    down, up = (variable.get_value().astype(x_MD.dtype) for variable in (self.down, self.up))
    added = grouped_matmul(grouped_matmul(x_MD, down, sizes_E), up, sizes_E)
    return self.inner.contract_grouped(x_MD, sizes_E) + self.scale * added


def low_rank(inner: Weight, rank: int, scale: float, key) -> LowRank:
  """The weight with an adapter that adds nothing yet: `down` from a normal of deviation 1 / sqrt(inputs), `up` zero."""
  layout, sizes = Layout.of(inner), dict(zip(inner.axes, inner.shape[-len(inner.axes):])) | {'P': rank}
  shape = lambda letters: (*inner.stack, *(sizes[letter] for letter in letters))
  fan_in = 1
  for letter in inner.inputs: fan_in *= sizes[letter]
  down = jax.random.normal(key, shape(f'{layout.experts}{inner.inputs}P')) * fan_in ** -.5
  return LowRank(inner, down, jnp.zeros(shape(f'{layout.experts}P{layout.outputs}')), scale)


def _param(array, axes: str, inputs: str):
  return array if isinstance(array, nnx.Variable) else nnx.Param(array, axes=axes, inputs=inputs)


def held(model):
  """The model with its parameters as `Held`: no optimizer moves them. What is not moved by its gradient, such as the biases
  that balance experts and counters of steps, goes on."""
  plain = lambda variable: type(variable) is nnx.Param
  return tree.rewrite(model, nnx.Param, lambda _, variable: _as(Held, variable) if plain(variable) else variable)


def released(model):
  """The inverse of `held`."""
  if not dict(tree.select(model, Held)): return model
  return tree.rewrite(model, Held, lambda _, variable: _as(nnx.Param, variable))


def _as(kind: type, variable):
  return kind(variable.get_value(), **{name: value for name, value in variable.get_metadata().items() if name in LETTERS})
