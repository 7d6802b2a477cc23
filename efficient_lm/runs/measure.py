"""What a model and a machine cost: parameters, FLOPs, bytes, seconds, joules. Figures are counted or measured; where there
is nothing to count or read, the answer is None or an error, never a guess.
"""
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

from efficient_lm.axes import is_variable
from efficient_lm.compression.coverage import active_share
from efficient_lm.models.attention import GroupedQueryAttention, LatentAttention
from efficient_lm.models.transformer import Block
from efficient_lm.tree import num_bytes, path_name, select, size
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
  """Numbers of parameters: all; those that one token is multiplied with or looked up in; the embedding table's."""
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


def logical_shape(weight: Weight) -> tuple[int, ...]:
  """The shape that a weight of any kind multiplies as, however it is stored."""
  return jax.eval_shape(lambda weight: weight.materialize(), weight).shape


def parameters(model) -> Parameters:
  """Counts a model's parameters; of `num_experts` experts, `active_experts` are active. Works on shapes as on arrays.

  A weight counts as the matrix that it stands for: quantized, its scales are not counted; factored, its product is.
  """
  weights = {path: (math.prod(logical_shape(weight)), weight.axes) for path, weight in select(model, Weight)}
  leaves = jax.tree_util.tree_leaves_with_path(model, is_leaf=lambda node: isinstance(node, Weight) or is_variable(node))
  others = sum(size(leaf) for _, leaf in leaves if is_variable(leaf))
  active = sum(count * active_share(model, path) for path, (count, _) in weights.items())
  embedding = sum(count for count, axes in weights.values() if axes == 'VD')
  return Parameters(sum(count for count, _ in weights.values()) + others, round(active) + others, embedding)


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
  *layers, _, N, H = logical_shape(layer.query)
  return 2 * 2 * math.prod(layers) * N * H * mean_keys(sequence_length, layer.window)


@attention_flops.register
def _(layer: LatentAttention, sequence_length):
  *layers, _, N, nope = logical_shape(layer.query_nope)
  rope, value = logical_shape(layer.query_rope)[-1], logical_shape(layer.value_up)[-1]
  return 2 * math.prod(layers) * N * (nope + rope + value) * mean_keys(sequence_length)


def flops_per_token(model, sequence_length: int) -> Flops:
  """Analytic FLOPs of one token in sequences of that length. Works on shapes as on arrays.

  Two a multiply-add; of experts only the active ones; causal attention counted once (a query meets the keys up to itself,
  not the whole square); the head counts, looking up an embedding does not, nor do norms, softmax, rotation and gates. So
  training takes close to 6 N of Kaplan et al. 2020, eq. 2.2, plus attention. Recomputation is not counted.
  """
  tied = getattr(model, 'own_head', True) is None
  forward = 0.0
  for path, weight in select(model, Weight):
    if weight.axes != 'VD' or tied: forward += 2 * math.prod(logical_shape(weight)) * active_share(model, path)
  forward += sum(attention_flops(block.attention, sequence_length) for _, block in select(model, Block))
  return Flops(forward, 3 * forward)


def state_bytes(model, opt_state) -> StateBytes:
  """Of a model and its optimizer's state, as arrays or shapes. Gradients are as large as what is trained."""
  return StateBytes(num_bytes(model), num_bytes(nnx.state(model, nnx.Param)), num_bytes(opt_state))


def histogram_arrays(model, largest: int = 65_536) -> Iterator[tuple[str, np.ndarray]]:
  """Path and values of each floating-point array, evenly thinned to at most `largest` numbers; where an array is spread
  over processes, of this process's first shard."""
  for path, leaf in jax.tree_util.tree_leaves_with_path(model):
    if not leaf.is_fully_addressable: leaf = leaf.addressable_data(0)
    if jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.size:
      yield path_name(path), np.asarray(leaf.reshape(-1)[::-(-leaf.size // largest)], np.float32)


def peak_flops(device) -> float | None:
  """Dense bfloat16 FLOP/s that the maker promises for `device`; None where no such figure is known, as for CPUs."""
  return next((peak for kind, peak in PEAK_FLOPS.items() if device.device_kind.startswith(kind)), None)


def peak_memory() -> tuple[int, str]:
  """The most bytes in use so far, and of what: the fullest local device, or this process where devices do not say."""
  stats = [device.memory_stats() or {} for device in jax.local_devices()]
  peaks = [device['peak_bytes_in_use'] for device in stats if 'peak_bytes_in_use' in device]
  if peaks: return max(peaks), 'device memory'
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, 'resident set of the process'


class Energy:
  """Joules drawn since it was made, by the counters of GPUs (NVML) or processor packages (RAPL), whole machine.

  `source` says which, or why there is none. Call `joules` every few minutes: RAPL counters wrap after some 2**38 uJ.
  """

  def __init__(self):
    self._counters, self.source = _nvml() if jax.default_backend() == 'gpu' else _rapl()
    self._last, self._total = [read() for read, _ in self._counters], 0.0

  def joules(self) -> float | None:
    if not self._counters: return None
    now = [read() for read, _ in self._counters]
    for before, after, (_, wrap) in zip(self._last, now, self._counters): self._total += (after - before) % wrap
    self._last = now
    return self._total


def _nvml():
  try:
    import pynvml
    pynvml.nvmlInit()
    handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
    counters = [(lambda handle=handle: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3, math.inf)
                for handle in handles]
    for read, _ in counters: read()
  except Exception as error: return [], f'none: NVML cannot be read ({type(error).__name__})'   # a driver raises its own
  return counters, f'NVML, {len(counters)} GPU'


def _rapl():
  if jax.default_backend() != 'cpu': return [], f'none: no counter for {jax.default_backend()}'
  counters = []
  for folder in sorted(Path('/sys/class/powercap').glob('intel-rapl:?')):   # packages; their parts have a second number
    try:
      wrap = int((folder / 'max_energy_range_uj').read_text()) / 1e6
      read = lambda path=folder / 'energy_uj': int(path.read_text()) / 1e6
      read()
    except OSError: continue
    counters.append((read, wrap))
  return counters, f'RAPL, {len(counters)} packages' if counters else 'none: RAPL cannot be read'


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
