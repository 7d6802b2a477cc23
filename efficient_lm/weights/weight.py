"""Weight: a matrix that knows how to be multiplied. Techniques wrap or replace Weights; models never name a technique.

Every Weight has `axes`, the letters of its last dimensions ('DNH', 'EDF'), and `inputs`, those of them that a forward
product sums over ('D'). Stacks of layers add dimensions in front (`stack`), which no product here looks at.
"""
import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from efficient_lm.ops.contract import contract
from efficient_lm.ops.grouped_matmul import grouped_matmul
from efficient_lm.ops.linear_cross_entropy import linear_cross_entropy
from efficient_lm.ops.quantized_matmul import PartedMatrix
from efficient_lm.parallel import sharding
from efficient_lm.weights.invariants import Experts

# Tags of an array that a pruning technique prunes: its number among those of this training, whether zeros that the array
# brings are those of an earlier mask, and the pattern that its mask will have, if any.
PRUNED_BY, MASKED_BEFORE, PRUNED_TO = 'pruned_by', 'masked_before', 'pruned_to'
ROWS = 1024   # of logits that a head has at a time where no fused product computes its loss


class Frozen(nnx.Variable):
  """Carried by the model and saved with it, never moved by the optimizer."""


class Weight(nnx.Module):
  """Subclasses must have a `shape` and `materialize`; the three verbs follow from these, or are done better.

  product: what its products multiply, in a few words: for tables, as `kind` is.
  """
  axes: str
  inputs: str

  product = 'float'

  @property
  def kind(self) -> str:
    """What the weight is stored as, in a few words."""
    return type(self).__name__

  @property
  def shape(self) -> tuple[int, ...]:
    """That of the array which `materialize` makes: known without making it, of arrays and of shapes."""
    raise NotImplementedError

  @property
  def stack(self) -> tuple[int, ...]:
    """The dimensions in front of `axes`: of the stack of layers that the weight is part of."""
    return self.shape[:len(self.shape) - len(self.axes)]

  @property
  def pruned(self) -> bool:
    """Whether a pruning technique of the training under way prunes it (see `Dense.tags`)."""
    return False

  def materialize(self) -> jax.Array:
    """The weight as one float array whose last dimensions are `axes`."""
    raise NotImplementedError

  def invariants(self) -> tuple:
    """What is promised of it: values of `weights.invariants`."""
    return (Experts(self.shape[-len(self.axes)]),) if self.axes.startswith('E') else ()

  def contract(self, equation: str, x, dtype=None):
    """einsum(equation, x, weight) in x's dtype; `dtype` asks for another one of the result (float32 logits)."""
    x = self.prepare_input(x, equation.split(',')[0])
    return self.multiply(equation, x, self.materialize().astype(x.dtype), dtype)

  def contract_grouped(self, x_MD, sizes_E):
    """Rows of x sorted by expert, `sizes_E` rows each, times that expert's matrix; rows past the sum give zeros."""
    x_MD = self.prepare_input(x_MD, 'M' + self.inputs)
    return self.multiply_grouped(x_MD, self.materialize().astype(x_MD.dtype), sizes_E)

  def multiply(self, equation: str, x, array, dtype=None):
    """How this weight multiplies an array that stands for it; a wrapper that only changes values asks its `inner`."""
    return contract(equation, x, array, dtype=dtype)

  def multiply_grouped(self, x_MD, array, sizes_E):
    """As `multiply`, for rows sorted by expert."""
    return grouped_matmul(x_MD, array, sizes_E)

  def prepare_input(self, x, axes: str):
    """What a product of this weight does to x first: activation quantization, a norm."""
    return x

  def cast(self, dtype):
    """The weight as products in `dtype` read it, to be moved between devices; itself, where that would change a product."""
    return self

  def for_decoding(self) -> 'Weight':
    """The weight as one CPU multiplies few rows by it fastest, of the same values; itself, if it is that already."""
    return self

  def nll(self, hidden_BTD, labels_BT):
    """Negative log-likelihood of labels under softmax(hidden @ weight), and the log normaliser: (B, T) float32 each."""
    hidden_BTD = self.prepare_input(hidden_BTD, 'BTD')
    head_DV = self.materialize().astype(hidden_BTD.dtype)
    return sharding.by_shard(_nll, ('BTD', 'DV', 'BT'), ('BT', 'BT'))(hidden_BTD, head_DV, labels_BT)

  def take(self, ids):
    """Rows of an embedding: ids of any shape -> that shape + (D,)."""
    # Gathered over its width first: the partitioner knows no way from a table cut both ways to rows cut by batch.
    return sharding.constrain(self.materialize(), self.axes)[ids]


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

  @property
  def shape(self): return self.inner.shape

  @property
  def pruned(self): return self.inner.pruned

  def materialize(self): return self.inner.materialize()
  def invariants(self): return self.inner.invariants()
  def prepare_input(self, x, axes: str): return self.inner.prepare_input(x, axes)
  def multiply(self, *arguments): return self.inner.multiply(*arguments)
  def multiply_grouped(self, *arguments): return self.inner.multiply_grouped(*arguments)


class Dense(Weight):
  """A plain trainable array. `tags` are further metadata of its Variable, by which an optimizer finds it; all that is made
  from it by `replaced` carries them on."""

  def __init__(self, array, axes: str, inputs: str, **tags):
    self.array, self.axes, self.inputs = nnx.Param(array, axes=axes, inputs=inputs, **tags), axes, inputs

  @property
  def kind(self): return jnp.dtype(self.array.get_value().dtype).name

  @property
  def shape(self): return self.array.get_value().shape

  @property
  def tags(self) -> dict:
    ours = (PRUNED_BY, MASKED_BEFORE, PRUNED_TO)
    return {name: value for name, value in self.array.get_metadata().items() if name in ours}

  @property
  def pruned(self): return PRUNED_BY in self.tags

  def replaced(self, array, axes: str | None = None, **tags) -> 'Dense':
    """With another array, and perhaps other letters or more tags."""
    return Dense(array, axes or self.axes, self.inputs, **self.tags | tags)

  def untagged(self) -> 'Dense':
    """Without tags."""
    return Dense(self.array.get_value(), self.axes, self.inputs)

  def materialize(self):
    return self.array.get_value()

  def cast(self, dtype):
    return self.replaced(self.array.get_value().astype(dtype))

  def for_decoding(self):
    """With its outputs first; tables that are looked up, an embedding and positions, have them there already."""
    return self if self.axes[0] in 'VT' else jax.jit(OutputsFirst)(self)


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

  @property
  def shape(self): return self.inner.shape[::-1]

  def materialize(self):
    return self.inner.materialize().T

  def contract(self, equation, x, dtype=None):
    x_axes, rest = equation.split(',')
    return self.inner.contract(f'{x_axes},{rest.replace(self.axes, self.inner.axes, 1)}', x, dtype)

  def prepare_input(self, x, axes: str):
    return self.inner.prepare_input(x, axes)


class SoftCapped(Wrapper):
  """A head whose products are bounded: cap * tanh(x / cap) (Gemma 2, arXiv 2408.00118, section 2)."""

  def __init__(self, inner: Weight, cap: float):
    self.inner, self.cap = inner, cap

  def contract(self, equation, x, dtype=None):
    logits = self.inner.contract(equation, x, jnp.float32)
    return (self.cap * jnp.tanh(logits / self.cap)).astype(dtype or x.dtype)

  def nll(self, hidden_BTD, labels_BT):
    """As Weight, by logits of about ROWS tokens at a time, which the backward pass computes again."""
    return by_pieces(lambda hidden_BtD, _: self.contract('BTD,DV->BTV', hidden_BtD, jnp.float32), hidden_BTD, labels_BT)


class OutputsFirst(Weight):
  """The values of `inner`, kept with its outputs in front ('NHD' for 'DNH', 'EFD' for experts): what one output needs lies
  together, as the product with a single row reads it fastest on a CPU. For decoding; not to be trained."""

  def __init__(self, inner: Weight):
    self.axes, self.inputs = inner.axes, inner.inputs
    self.order = ''.join(letter for letter in inner.axes if letter not in inner.inputs) + inner.inputs
    array = jnp.einsum(f'{inner.axes}->{self.order}', inner.materialize())
    self.array = nnx.Param(array, axes=self.order, inputs=inner.inputs)

  @property
  def shape(self):
    shape, n = self.array.get_value().shape, len(self.order)
    return (*shape[:-n], *(shape[-n:][self.order.index(letter)] for letter in self.axes))

  def materialize(self):
    return jnp.einsum(f'{self.order}->{self.axes}', self.array.get_value())

  def contract(self, equation, x, dtype=None):
    x_axes, rest = equation.split(',')
    x = self.prepare_input(x, x_axes)
    return contract(f'{x_axes},{rest.replace(self.axes, self.order, 1)}', x, self.array.get_value().astype(x.dtype),
                    dtype=dtype)

  def contract_grouped(self, x_MD, sizes_E):
    """As Weight; of experts with few rows, only those that have any are read."""
    return grouped_matmul(self.prepare_input(x_MD, 'M' + self.inputs), PartedMatrix(self.array.get_value()), sizes_E)


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


def by_pieces(logits, hidden_BTD, labels_BT):
  """Negative log-likelihood of labels and the log normaliser, (B, T) float32 each, of logits(hidden_BtD, piece) -> (B, t, V)
  float32, which are made for about ROWS tokens at a time, and again in the backward pass. `piece`: the number of these."""
  B, T, _ = hidden_BTD.shape
  # Cut along T, which the mesh never splits.
  num_pieces = next(n for n in range(1, T + 1) if T % n == 0 and (B * T // n <= ROWS or n == T))

  @jax.checkpoint
  def piece(arguments):
    i, hidden_BtD, labels_Bt = arguments
    logits_BtV = logits(hidden_BtD, i)
    logsumexp_Bt = jax.nn.logsumexp(logits_BtV, axis=-1)
    return logsumexp_Bt - jnp.take_along_axis(logits_BtV, labels_Bt[..., None], -1)[..., 0], logsumexp_Bt

  cut = lambda a: jnp.moveaxis(a.reshape(B, num_pieces, T // num_pieces, *a.shape[2:]), 1, 0)
  found = lax.map(piece, (jnp.arange(num_pieces), cut(hidden_BTD), cut(labels_BT)))
  return tuple(jnp.moveaxis(a, 0, 1).reshape(B, T) for a in found)


def initial(key, sizes: dict[str, int], axes: str, inputs: str, scale: float = 1.0) -> Dense:
  """A Dense weight drawn from a normal of deviation scale / sqrt(fan-in), fan-in counted over `inputs`."""
  fan_in = 1
  for letter in inputs: fan_in *= sizes[letter]
  return Dense(jax.random.normal(key, [sizes[letter] for letter in axes]) * (scale * fan_in ** -.5), axes, inputs)
