"""Weight: a matrix that knows how to be multiplied. Techniques wrap or replace Weights; models never name a technique.

Every Weight has `axes`, the letters of its last dimensions ('DNH', 'EDF'), and `inputs`, those of them that a forward
product sums over ('D'). Stacks of layers add dimensions in front, which no method here looks at.
"""
import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from efficient_lm import axes as alphabet
from efficient_lm.ops.contract import contract
from efficient_lm.ops.grouped_matmul import grouped_matmul
from efficient_lm.ops.linear_cross_entropy import linear_cross_entropy


class Frozen(nnx.Variable):
  """Carried by the model and saved with it, never moved by the optimizer."""


class Weight(nnx.Module):
  """Subclasses must say what they are worth as an array; the three verbs follow from that, or are done better."""
  axes: str
  inputs: str

  product = 'float'   # what its products multiply: for tables, as `kind` is

  @property
  def kind(self) -> str:
    """What the weight is stored as, in a few words."""
    return type(self).__name__

  def materialize(self) -> jax.Array:
    """The weight as one float array whose last dimensions are `axes`."""
    raise NotImplementedError

  def contract(self, equation: str, x, dtype=None):
    """einsum(equation, x, weight) in x's dtype; `dtype` asks for another one of the result (float32 logits)."""
    x = self.rounded(x, equation.split(',')[0])
    return self.multiply(equation, x, self.materialize().astype(x.dtype), dtype)

  def contract_grouped(self, x_MD, sizes_E):
    """Rows of x sorted by expert, `sizes_E` rows each, times that expert's matrix; rows past the sum give zeros."""
    x_MD = self.rounded(x_MD, 'M' + self.inputs)
    return self.multiply_grouped(x_MD, self.materialize().astype(x_MD.dtype), sizes_E)

  def multiply(self, equation: str, x, array, dtype=None):
    """How this weight multiplies an array that it is worth; a kind that only changes what it is worth asks its `inner`."""
    return contract(equation, x, array, dtype=dtype)

  def multiply_grouped(self, x_MD, array, sizes_E):
    """As `multiply`, for rows sorted by expert."""
    return grouped_matmul(x_MD, array, sizes_E)

  def rounded(self, x, axes: str):
    """What a product of this weight does to x first; activation quantization lives here."""
    return x

  def narrowed(self, dtype):
    """The weight as products in `dtype` read it, to be moved between devices; itself, where that would change a product."""
    return self

  def nll(self, hidden_BTD, labels_BT):
    """Negative log-likelihood of labels under softmax(hidden @ weight), and the log normaliser: (B, T) float32 each."""
    hidden_BTD = self.rounded(hidden_BTD, 'BTD')
    head_DV = self.materialize().astype(hidden_BTD.dtype)
    return alphabet.by_shard(_nll, ('BTD', 'DV', 'BT'), ('BT', 'BT'))(hidden_BTD, head_DV, labels_BT)

  def take(self, ids):
    """Rows of an embedding: ids of any shape -> that shape + (D,)."""
    # Gathered over its width first: the partitioner knows no way from a table cut both ways to rows cut by batch.
    return alphabet.constrain(self.materialize(), 'VD')[ids]


class Wrapper(Weight):
  """A weight around another one, as techniques nest them: what a subclass does not say anew is as `inner` has it."""
  inner: Weight

  @property
  def axes(self): return self.inner.axes

  @property
  def inputs(self): return self.inner.inputs

  @property
  def kind(self): return self.inner.kind

  @property
  def product(self): return self.inner.product

  def materialize(self): return self.inner.materialize()
  def rounded(self, x, axes: str): return self.inner.rounded(x, axes)
  def multiply(self, *arguments): return self.inner.multiply(*arguments)
  def multiply_grouped(self, *arguments): return self.inner.multiply_grouped(*arguments)


class Dense(Weight):
  """A plain trainable array."""

  def __init__(self, array, axes: str, inputs: str):
    self.array, self.axes, self.inputs = nnx.Param(array, axes=axes, inputs=inputs), axes, inputs

  @property
  def kind(self): return jnp.dtype(self.array.get_value().dtype).name

  def materialize(self):
    return self.array.get_value()

  def narrowed(self, dtype):
    return Dense(self.array.get_value().astype(dtype), self.axes, self.inputs)


class Transposed(Weight):
  """An embedding 'VD' read as a head 'DV', so that both can be one array (Press and Wolf 2017)."""

  def __init__(self, inner: Weight):
    self.inner = inner

  @property
  def axes(self): return self.inner.axes[::-1]

  @property
  def inputs(self): return self.inner.inputs

  @property
  def kind(self): return self.inner.kind

  def materialize(self):
    return self.inner.materialize().T

  def contract(self, equation, x, dtype=None):
    x_axes, rest = equation.split(',')
    return self.inner.contract(f'{x_axes},{rest.replace(self.axes, self.inner.axes, 1)}', x, dtype)

  def rounded(self, x, axes: str):
    return self.inner.rounded(x, axes)


class OutputsFirst(Weight):
  """What `inner` is worth, kept with its outputs in front ('NHD' for 'DNH'): what one output needs lies together, as the
  product with a single row reads it fastest on a CPU. For decoding; not to be trained."""

  def __init__(self, inner: Weight):
    self.axes, self.inputs = inner.axes, inner.inputs
    self.order = ''.join(letter for letter in inner.axes if letter not in inner.inputs) + inner.inputs
    array = jnp.einsum(f'{inner.axes}->{self.order}', inner.materialize())
    self.array = nnx.Param(array, axes=self.order, inputs=inner.inputs)

  def materialize(self):
    return jnp.einsum(f'{self.order}->{self.axes}', self.array.get_value())

  def contract(self, equation, x, dtype=None):
    x_axes, rest = equation.split(',')
    x = self.rounded(x, x_axes)
    return contract(f'{x_axes},{rest.replace(self.axes, self.order, 1)}', x, self.array.get_value().astype(x.dtype),
                    dtype=dtype)


def _nll(hidden_BTD, head_DV, labels_BT):
  """linear_cross_entropy, also where this device has a part of the vocabulary: partial sums then meet over 'tensor'."""
  mesh = jax.sharding.get_abstract_mesh()
  whole = 'tensor' not in mesh.manual_axes or mesh.shape['tensor'] == 1
  if whole: return linear_cross_entropy(hidden_BTD, head_DV, labels_BT)
  V = head_DV.shape[1]
  labels_BT = labels_BT - lax.axis_index('tensor') * V
  here_BT = (labels_BT >= 0) & (labels_BT < V)
  nll_BT, part_BT = linear_cross_entropy(hidden_BTD, head_DV, jnp.clip(labels_BT, 0, V - 1))
  largest_BT = lax.pmax(lax.stop_gradient(part_BT), 'tensor')
  logsumexp_BT = largest_BT + jnp.log(lax.psum(jnp.exp(part_BT - largest_BT), 'tensor'))
  return logsumexp_BT - lax.psum(jnp.where(here_BT, part_BT - nll_BT, 0), 'tensor'), logsumexp_BT


def initial(key, sizes: dict[str, int], axes: str, inputs: str, scale: float = 1.0) -> Dense:
  """A Dense weight drawn from a normal of deviation scale / sqrt(fan-in), fan-in counted over `inputs`."""
  fan_in = 1
  for letter in inputs: fan_in *= sizes[letter]
  return Dense(jax.random.normal(key, [sizes[letter] for letter in axes]) * (scale * fan_in ** -.5), axes, inputs)
