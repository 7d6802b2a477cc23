"""Static sizes of the tiles of the grouped products, in the letters of the op: M rows, K inputs, N outputs.

The forward product has M x N results and steps over K, 'dgrad' M x K results and steps over N, 'wgrad' K x N results and
steps over M. Nothing here has been measured on a device yet: the tables of tuned tiles are empty and the rules below follow
from sizes of memories and matrix units alone.
"""
import dataclasses
import itertools
import math

PASSES = ('forward', 'dgrad', 'wgrad')
MiB = 2 ** 20
# Fast memory that a kernel may fill on a TPU, of 64 (v5p, tpu7x) to 128 MiB; of shared memory on Hopper, all of 227 KiB but
# for barriers.
VMEM = 40 * MiB
SHARED = 223 * 1024


@dataclasses.dataclass(frozen=True)
class TpuTiles:
  """Tiles in VMEM. One that is larger than its dimension is cut down to it."""
  M: int
  K: int
  N: int

  def vmem(self, of: str, x_bytes: int, w_bytes: int) -> int:
    """Bytes that the pass fills: two buffers of each block, float32 sums, one product, a wider or masked copy."""
    x, w, y = self.M * self.K, self.K * self.N, self.M * self.N
    if of == 'wgrad': return 2 * (x + y + w) * x_bytes + 8 * w + (x + y) * x_bytes
    result = y if of == 'forward' else x
    return 2 * ((x + y) * x_bytes + w * w_bytes) + 8 * result + w * x_bytes * (w_bytes == 1)


@dataclasses.dataclass(frozen=True)
class GpuTiles:
  """Tiles of two consumer warpgroups that share the first dimension of the result.

  stages: steps whose operands are in shared memory or under way at a time.
  band: row tiles (wgrad: tiles of K) that are swept over all columns together, so that the operands of what runs at the same
    time fit the L2 cache.
  cluster: blocks, 1 or 2, that take neighbouring columns of the result and copy their common operand once, half each. An odd
    number of tiles across wastes one then.
  """
  M: int
  K: int
  N: int
  stages: int = 4
  band: int = 8
  cluster: int = 1

  def shared(self, of: str, w_bytes: int = 2) -> int:
    """Bytes of shared memory that the pass fills: stages of both operands, a widened matrix twice, chunks of the result."""
    x, w, y = self.M * self.K * 2, self.K * self.N, self.M * self.N * 2
    operands = {'forward': x + w * w_bytes, 'dgrad': y + w * w_bytes + 4 * self.N, 'wgrad': x + y}[of]
    return self.stages * operands + 2 * w * 2 * (of != 'wgrad' and w_bytes == 1) + 3 * 2 * 64 * 32 * 2


@dataclasses.dataclass(frozen=True)
class BlackwellTiles:
  """Tiles of 128 rows, the lanes of tensor memory, by `columns`, at most 256, in steps of `inner` inputs; else as above."""
  columns: int = 256
  inner: int = 64
  stages: int = 4
  band: int = 8

  def shared(self) -> int:
    """Bytes of shared memory: stages of both operands, two chunks of the result, barriers."""
    return self.stages * (128 + self.columns) * self.inner * 2 + 2 * 128 * 64 * 2 + 1024


# (pass, M, K, N, E, name of x's dtype, name of w's dtype) -> tiles, as found on a device.
TUNED_TPU: dict[tuple, TpuTiles] = {}
TUNED_GPU: dict[tuple, GpuTiles] = {}


def key(of: str, M: int, K: int, N: int, E: int, x_dtype, w_dtype) -> tuple:
  """What the tables go by."""
  return of, M, K, N, E, x_dtype.name, w_dtype.name


def tpu_tiles(of: str, M: int, K: int, N: int, E: int, x_dtype, w_dtype) -> TpuTiles:
  """Tiles for a pass over these shapes, from the table or by rule: long steps, so that a group's matrix stays in VMEM over
  all its rows, and row tiles about as long as an average group."""
  if tuned := TUNED_TPU.get(key(of, M, K, N, E, x_dtype, w_dtype)): return tuned
  group = min(max(32, 2 ** round(math.log2(max(M / E, 1)))), 512)
  step = {'forward': K, 'dgrad': N, 'wgrad': M}[of]
  step = step if step <= 2048 else 1024
  shapes = {'forward': ((group, step, 1024), (group, step, 512)), 'dgrad': ((group, 1024, step), (group, 512, step)),
            'wgrad': ((group, 1024, 1024), (group, 512, 512))}[of]
  fitting = [tiles for tiles in (TpuTiles(*shape) for shape in shapes)
             if tiles.vmem(of, x_dtype.itemsize, w_dtype.itemsize) <= VMEM]
  return (fitting or [TpuTiles(128, 512, 512)])[0]


def tpu_candidates(of: str, x_dtype, w_dtype) -> list[TpuTiles]:
  """Tiles worth trying on a device, all of which fit."""
  every = (TpuTiles(*shape) for shape in itertools.product((128, 256, 512, 1024), (512, 1024, 2048), (512, 1024, 2048)))
  return [tiles for tiles in every if tiles.vmem(of, x_dtype.itemsize, w_dtype.itemsize) <= VMEM]


def gpu_tiles(of: str, M: int, K: int, N: int, E: int, x_dtype, w_dtype) -> GpuTiles:
  """Tiles for a pass over these shapes, from the table or by rule: the largest that two warpgroups hold in registers, with
  as many stages as fit; half as many rows where groups are short on average, as in decoding."""
  if tuned := TUNED_GPU.get(key(of, M, K, N, E, x_dtype, w_dtype)): return tuned
  rows = 64 if of != 'wgrad' and M <= 64 * E else 128
  shape = {'forward': (rows, 64, 256), 'dgrad': (rows, 256, 64), 'wgrad': (64, 128, 256)}[of]
  return next(tiles for stages in range(8, 0, -1)
              if (tiles := GpuTiles(*shape, stages)).shared(of, w_dtype.itemsize) <= SHARED)


def gpu_candidates(of: str, w_dtype) -> list[GpuTiles]:
  """Tiles worth trying on a device, all of which fit."""
  # Consumers split rows or, where those are few or weights are widened, columns: in shares of whole 64s.
  wide = [(M, width) for M in (64, 128) for width in (128, 192, 256)
          if width != 192 or (M == 128 and w_dtype.itemsize > 1)]
  shapes = {'forward': [(M, 64, N) for M, N in wide], 'dgrad': [(M, K, 64) for M, K in wide],
            'wgrad': [(64, 128, 128), (64, 128, 256), (64, 256, 128), (128, 128, 128)]}[of]
  every = (GpuTiles(*shape, stages, band, cluster) for shape in shapes for stages in (3, 4, 5, 6) for band in (4, 8, 16)
           for cluster in (1, 2))
  return [tiles for tiles in every if tiles.shared(of, w_dtype.itemsize) <= SHARED]
