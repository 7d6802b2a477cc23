"""The functions of other libraries for an operation, where the libraries are installed: what one could use instead.

Each maker takes a case and returns a function of the case's arguments, or None if the library has none for the case.
"""
import importlib.util
from collections.abc import Callable

import jax
import jax.numpy as jnp

from efficient_lm.benches.timer import Calls
from efficient_lm.lazy import lazy

tokamax = lazy('tokamax')
torch = lazy('torch')


def installed(name: str) -> bool:
  """Whether a package is installed; for PyTorch also, whether it computes on the kind of device that JAX does."""
  if not importlib.util.find_spec(name): return False
  if name != 'torch': return True
  return jax.default_backend() == ('gpu' if torch.cuda.is_available() else 'cpu')


def passes(case, product: Callable, x, w, g) -> Callable:
  """The passes of the product of x and w that the case's field `of` names: 'forward', 'dgrad', 'wgrad', or 'all'."""
  if case.of == 'forward': return product(x, w)
  if case.of == 'dgrad': return jax.vjp(lambda x: product(x, w), x)[1](g)[0]
  if case.of == 'wgrad': return jax.vjp(lambda w: product(x, w), w)[1](g)[0]
  y, pull = jax.vjp(product, x, w)
  return y, *pull(g)


def tokamax_grouped_matmul(case):
  """tokamax.ragged_dot, with the kernel that it chooses."""
  if getattr(case, 'weight', None): return None
  def function(x_MI, w_EIO, sizes_E, scale_EO, g_MO):
    return passes(case, lambda x, w: tokamax.ragged_dot(x, w, group_sizes=sizes_E), x_MI, w_EIO, g_MO)
  return function


def tokamax_linear_cross_entropy(case):
  """tokamax's fused loss, which is summed over tokens: its result is another one, but the work is the same."""
  def loss(hidden, head, labels): return tokamax.linear_softmax_cross_entropy_loss(hidden, labels, head, reduction='sum')
  def function(hidden_BTD, head_DV, labels_BT, *_):
    hidden_MD, labels_M = hidden_BTD.reshape(-1, hidden_BTD.shape[-1]), labels_BT.reshape(-1)
    if case.of == 'forward': return loss(hidden_MD, head_DV, labels_M)
    return jax.grad(loss, (0, 1))(hidden_MD, head_DV, labels_M)
  return function


def torch_grouped_matmul(case):
  """torch._grouped_mm, which takes 16-bit numbers and the ends of groups."""
  if getattr(case, 'weight', None) or jnp.dtype(case.dtype).itemsize != 2 or case.of == 'all': return None
  def function(x_MI, w_EIO, sizes_E, scale_EO, g_MO):
    ends_E = torch.cumsum(sizes_E, 0, dtype=torch.int32)
    if case.of == 'forward': return torch._grouped_mm(x_MI, w_EIO, offs=ends_E)
    if case.of == 'dgrad': return torch._grouped_mm(g_MO, w_EIO.transpose(-2, -1), offs=ends_E)
    return torch._grouped_mm(x_MI.t(), g_MO, offs=ends_E)
  return function


# (library, operation) -> maker. The results of the functions in OTHER_RESULT are not compared.
LIBRARIES = {
  ('tokamax', 'grouped_matmul'): tokamax_grouped_matmul,
  ('tokamax', 'linear_cross_entropy'): tokamax_linear_cross_entropy,
}
TORCH = {'grouped_matmul': {'torch._grouped_mm': torch_grouped_matmul}}
OTHER_RESULT = {('tokamax', 'linear_cross_entropy')}


def functions(op: str, case) -> dict[str, tuple[Callable, bool]]:
  """Library -> a function of JAX arrays, and whether its result is that of the operation."""
  makers = {library: make for (library, name), make in LIBRARIES.items() if name == op and installed(library)}
  return {library: (function, (library, op) not in OTHER_RESULT) for library, make in makers.items()
          if (function := make(case))}


def torch_functions(op: str, case) -> dict[str, Callable]:
  """Name -> a function of PyTorch tensors."""
  makers = TORCH.get(op, {}) if installed('torch') else {}
  return {name: function for name, make in makers.items() if (function := make(case))}


def torch_way(function: Callable, sets: list[tuple]) -> tuple[Callable, Callable]:
  """Two functions: one returns the result on the first of `sets` as a JAX array, the other returns its `Calls`. The tensors
  share the memory of JAX's arrays."""
  tensors = [[None if array is None else torch.from_dlpack(array) for array in arguments] for arguments in sets]
  def start(i):
    with torch.no_grad(): return function(*tensors[i % len(tensors)])
  def wait(_):
    if torch.cuda.is_available(): torch.cuda.synchronize()
  calls = Calls(start, 1, wait)
  calls.seconds(1)   # warms up, so that errors are raised here
  return lambda: jnp.from_dlpack(start(0).contiguous()), lambda: calls
