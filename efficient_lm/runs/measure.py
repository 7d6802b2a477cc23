"""What a model and a machine cost: parameters, FLOPs, bytes, seconds. Figures are counted or measured; where there is
nothing to count or read, the answer is None or an error, never a guess.
"""
import contextlib
import dataclasses
import functools
import math
import resource
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from efficient_lm.compression.coverage import active_share, is_multiplied, num_biases
from efficient_lm.models.attention import GroupedQueryAttention, LatentAttention
from efficient_lm.models.transformer import Block
from efficient_lm.tree import is_variable, num_bytes, path_name, select, size
from efficient_lm.weights.weight import Weight

# Dense bfloat16 FLOP/s of one JAX device, from the makers' data sheets; the first name that begins the device kind counts.
# (On TPU v2, v3 and 7x a device is one of a chip's two cores.)
PEAK_FLOPS = {
  'NVIDIA GB200': 2.5e15, 'NVIDIA B200': 2.25e15, 'NVIDIA GH200': 989e12, 'NVIDIA H200 NVL': 835e12,
  'NVIDIA H200': 989e12, 'NVIDIA H100 NVL': 835e12, 'NVIDIA H100 PCIe': 756e12, 'NVIDIA H100': 989e12,
  'NVIDIA H800': 989e12, 'NVIDIA A100': 312e12, 'NVIDIA A800': 312e12, 'NVIDIA A40': 150e12, 'NVIDIA A10': 125e12,
  'NVIDIA L40S': 362e12, 'NVIDIA L40': 181e12, 'NVIDIA L4': 121e12,
  'TPU v2': 22.5e12, 'TPU v3': 61.5e12, 'TPU v4 lite': 138e12, 'TPU v4': 275e12, 'TPU v5 lite': 197e12,
  'TPU v5e': 197e12, 'TPU v5': 459e12, 'TPU v6': 918e12, 'TPU7': 1153e12,
}


@dataclasses.dataclass(frozen=True)
class Parameters:
  """Numbers of parameters: all; those that one token is multiplied with or looked up in; those of the embedding
  and of a table of positions."""
  total: int
  active: int
  embedding: int


@dataclasses.dataclass(frozen=True)
class Flops:
  """FLOPs of one token: a forward pass; training, three times that (the backward pass takes two products for one)."""
  forward: float
  training: float


@dataclasses.dataclass(frozen=True)
class StateBytes:
  """Bytes that training holds beside activations, over all devices."""
  model: int
  gradients: int
  optimizer: int

  @property
  def total(self) -> int:
    return self.model + self.gradients + self.optimizer


def parameters(model) -> Parameters:
  """Counts a model's parameters; of `num_experts` experts, `active_experts` are active. Works on shapes as on arrays.

  A weight counts as the matrix that it stands for: quantized, its scales are not counted; factored, its product is.
  """
  weights = {path: (math.prod(weight.shape), weight.axes) for path, weight in select(model, Weight)}
  leaves = jax.tree_util.tree_leaves_with_path(model, is_leaf=lambda node: isinstance(node, Weight) or is_variable(node))
  others = sum(size(leaf) for _, leaf in leaves if is_variable(leaf)) + num_biases(model)
  active = sum(count * active_share(model, path) for path, (count, _) in weights.items())
  embedding = sum(count for count, axes in weights.values() if axes in ('VD', 'TD'))
  return Parameters(sum(count for count, _ in weights.values()) + others, round(active) + others, embedding)


@jax.jit
def _nonzeros(weight):
  return jnp.count_nonzero(weight.materialize())


def nonzero_parameters(model) -> int:
  """Parameters that are not zero, of the matrices that weights stand for; all others count."""
  zeros = (math.prod(weight.shape) - int(_nonzeros(weight)) for _, weight in select(model, Weight))
  return parameters(model).total - sum(zeros)


def bits_per_parameter(model) -> float:
  """Bits that a parameter takes in memory on average, with scales, masks and all else that belongs to the model."""
  return 8 * num_bytes(model) / parameters(model).total


def mean_keys(sequence_length: int, window: int | None = None) -> float:
  """How many keys a query attends to, on average over the sequence, itself included."""
  window = min(window or sequence_length, sequence_length)
  return (window * (window + 1) / 2 + (sequence_length - window) * window) / sequence_length


@functools.singledispatch
def attention_flops(layer, sequence_length: int) -> float:
  """Forward FLOPs a token of what an attention layer does beside its weights; a new kind of layer registers its own."""
  raise TypeError(f'no FLOP count is registered for {type(layer).__name__}: see measure.attention_flops')


@attention_flops.register
def _(layer: GroupedQueryAttention, sequence_length):
  *layers, _, N, H = layer.query.shape
  return 2 * 2 * math.prod(layers) * N * H * mean_keys(sequence_length, layer.window)


@attention_flops.register
def _(layer: LatentAttention, sequence_length):
  *layers, _, N, nope = layer.query_nope.shape
  rope, value = layer.query_rope.shape[-1], layer.value_up.shape[-1]
  return 2 * math.prod(layers) * N * (nope + rope + value) * mean_keys(sequence_length)


def flops_per_token(model, sequence_length: int) -> Flops:
  """Analytic FLOPs of one token in sequences of that length. Works on shapes as on arrays.

  Two a multiply-add; of experts only the active ones; causal attention counted once (a query meets the keys up to itself,
  not the whole square); the head counts, looking up an embedding does not, nor do norms, softmax, rotation and gates. Zeros
  count, masked ones too: they are multiplied; blocks that are not stored (`BlockSparse`) do not, since they are not. So
  training takes close to 6 N of Kaplan et al. 2020, eq. 2.2, plus attention. Recomputation is not counted.
  """
  tied = getattr(model, 'own_head', True) is None
  forward = 0.0
  for path, weight in select(model, Weight):
    if is_multiplied(weight, tied): forward += 2 * weight.num_multiplied * active_share(model, path)
  forward += sum(attention_flops(block.attention, sequence_length) for _, block in select(model, Block))
  return Flops(forward, 3 * forward)


def state_bytes(model, opt_state) -> StateBytes:
  """Of a model and its optimizer's state, as arrays or shapes. Gradients are as large as what is trained."""
  return StateBytes(num_bytes(model), num_bytes(nnx.state(model, nnx.Param)), num_bytes(opt_state))


def histogram_arrays(model, largest: int = 65_536) -> Iterator[tuple[str, np.ndarray]]:
  """Path and values of each floating-point array, evenly thinned to at most `largest` numbers; where an array is spread
  over processes, of this process's first shard."""
  for path, leaf in jax.tree_util.tree_leaves_with_path(model):
    # As numpy: what JAX computes here all processes would have to compute, on all devices of the mesh in force.
    if not leaf.is_fully_addressable: leaf = np.asarray(leaf.addressable_data(0))
    if jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.size:
      yield path_name(path), np.asarray(leaf.reshape(-1)[::-(-leaf.size // largest)], np.float32)


def peak_flops(device) -> float | None:
  """Dense bfloat16 FLOP/s that the maker promises for `device`; None where no such figure is known, as for CPUs."""
  return next((peak for kind, peak in PEAK_FLOPS.items() if device.device_kind.startswith(kind)), None)


class PeakMemory:
  """The most bytes in use since it was made: of the fullest local device, or of this process where devices do not say.

  A device's own peak is that since the program began, and cannot be reset: where it has not grown, what came since has not
  reached it, and how much that was is not known.
  """

  def __init__(self):
    self._before = _device_peak()
    if self._before is None: _reset_resident_peak()

  def read(self) -> tuple[int | None, str]:
    """Bytes, None where they are not known, and of what memory."""
    peak = _device_peak()
    if peak is not None: return peak if peak > self._before else None, 'device memory'
    return _resident_peak(), 'resident set of the process'


def free_memory() -> int | None:
  """Bytes that the fullest local device, or this machine where devices do not say, could still give; None if nobody says."""
  stats = [device.memory_stats() or {} for device in jax.local_devices()]
  known = [device['bytes_limit'] - device['bytes_in_use'] for device in stats if 'bytes_limit' in device]
  if known: return min(known)
  try: lines = Path('/proc/meminfo').read_text().splitlines()
  except OSError: return None
  return next((int(line.split()[1]) * 1024 for line in lines if line.startswith('MemAvailable:')), None)


def _device_peak() -> int | None:
  stats = [device.memory_stats() or {} for device in jax.local_devices()]
  return max((device['peak_bytes_in_use'] for device in stats if 'peak_bytes_in_use' in device), default=None)


def _reset_resident_peak():
  """Linux keeps the peak since this was written last; other systems since the process began."""
  with contextlib.suppress(OSError): Path('/proc/self/clear_refs').write_text('5')


def _resident_peak() -> int:
  try:
    line = next(line for line in Path('/proc/self/status').read_text().splitlines() if line.startswith('VmHWM:'))
    return int(line.split()[1]) * 1024
  except (OSError, StopIteration): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def interleaved(candidates: dict[str, Callable], repeats: int = 5) -> dict[str, list[float]]:
  """Seconds of each call, in turns A B A B …, so that a machine that slows down slows all; after one call to warm up."""
  for call in candidates.values(): jax.block_until_ready(call())
  seconds = {name: [] for name in candidates}
  for _ in range(repeats):
    for name, call in candidates.items():
      start = time.perf_counter()
      jax.block_until_ready(call())
      seconds[name].append(time.perf_counter() - start)
  return seconds


def time_call(call: Callable, repeats: int = 5) -> float:
  """Median seconds of `call()`, results waited for, after one call to warm up."""
  return statistics.median(interleaved({'call': call}, repeats)['call'])
