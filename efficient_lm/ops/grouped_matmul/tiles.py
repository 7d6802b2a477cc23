"""Static sizes of the tiles of the grouped products: M rows, I inputs, O outputs.

The forward product has M x O results and steps over I, 'dgrad' has M x I results and steps over O, and 'wgrad' has I x O
results and steps over M. No tiles have been measured on a device yet: the tables of tuned tiles are empty, and the rules
below follow from the sizes of memories and matrix units alone.
"""
import dataclasses
import itertools
import math

PASSES = ('forward', 'dgrad', 'wgrad')
MiB = 2 ** 20
# VMEM that a kernel may fill on a TPU, which has 64 (v5p, tpu7x) to 128 MiB; and shared memory on Hopper: the 227 KiB
# without the barriers. In bytes.
VMEM = 40 * MiB
SHARED = 223 * 1024


@dataclasses.dataclass(frozen=True)
class TpuTiles:
  """Tiles in VMEM. A size that is larger than its dimension is cut to the dimension."""
  M: int
  I: int
  O: int

  def vmem(self, of: str, x_bytes: int, w_bytes: int) -> int:
    """Bytes of VMEM that the pass fills: two buffers of each block, float32 sums, one product, a converted or masked
    copy."""
    x, w, y = self.M * self.I, self.I * self.O, self.M * self.O
    if of == 'wgrad': return 2 * (x + y + w) * x_bytes + 8 * w + (x + y) * x_bytes
    result = y if of == 'forward' else x
    return 2 * ((x + y) * x_bytes + w * w_bytes) + 8 * result + w * x_bytes * (w_bytes == 1)


@dataclasses.dataclass(frozen=True)
class GpuTiles:
  """Tiles of two consumer warpgroups that share the first dimension of the result.

  stages: steps whose operands are in shared memory or in flight at a time.
  band: row tiles (tiles of I for wgrad) that are swept over all columns together, so that the operands in use fit the L2
    cache.
  cluster: 1 or 2 blocks of threads, which compute neighbouring columns of the result and copy their common operand once,
    half each. With 2, one tile is wasted where the number of tiles along the columns is odd.
  """
  M: int
  I: int
  O: int
  stages: int = 4
  band: int = 8
  cluster: int = 1

  def shared(self, of: str, w_bytes: int = 2) -> int:
    """Bytes of shared memory that the pass fills: stages of both operands, two converted matrices, chunks of the result."""
    x, w, y = self.M * self.I * 2, self.I * self.O, self.M * self.O * 2
    operands = {'forward': x + w * w_bytes, 'dgrad': y + w * w_bytes + 4 * self.O, 'wgrad': x + y}[of]
    return self.stages * operands + 2 * w * 2 * (of != 'wgrad' and w_bytes == 1) + 3 * 2 * 64 * 32 * 2


@dataclasses.dataclass(frozen=True)
class BlackwellTiles:
  """Tiles of 128 rows (the lanes of tensor memory) by at most 256 `columns`, in steps of `inner` inputs. stages, band: as in
  `GpuTiles`."""
  columns: int = 256
  inner: int = 64
  stages: int = 4
  band: int = 8

  def shared(self) -> int:
    """Bytes of shared memory: stages of both operands, two chunks of the result, barriers."""
    return self.stages * (128 + self.columns) * self.inner * 2 + 2 * 128 * 64 * 2 + 1024


# (pass, M, I, O, E, name of x's dtype, name of w's dtype) -> tiles, as found on a device.
TUNED_TPU: dict[tuple, TpuTiles] = {}
TUNED_GPU: dict[tuple, GpuTiles] = {}


def key(of: str, M: int, I: int, O: int, E: int, x_dtype, w_dtype) -> tuple:
  """The key of a pass in the tables."""
  return of, M, I, O, E, x_dtype.name, w_dtype.name


def tpu_tiles(of: str, M: int, I: int, O: int, E: int, x_dtype, w_dtype) -> TpuTiles:
  """Tiles for a pass, from the table or by rule: long steps, so that a group's matrix stays in VMEM for all its rows, and
  row tiles about as long as an average group."""
  if tuned := TUNED_TPU.get(key(of, M, I, O, E, x_dtype, w_dtype)): return tuned
  group = min(max(32, 2 ** round(math.log2(max(M / E, 1)))), 512)
  step = {'forward': I, 'dgrad': O, 'wgrad': M}[of]
  step = step if step <= 2048 else 1024
  shapes = {'forward': ((group, step, 1024), (group, step, 512)), 'dgrad': ((group, 1024, step), (group, 512, step)),
            'wgrad': ((group, 1024, 1024), (group, 512, 512))}[of]
  fitting = [tiles for tiles in (TpuTiles(*shape) for shape in shapes)
             if tiles.vmem(of, x_dtype.itemsize, w_dtype.itemsize) <= VMEM]
  return (fitting or [TpuTiles(128, 512, 512)])[0]


def tpu_candidates(of: str, x_dtype, w_dtype) -> list[TpuTiles]:
  """The tiles that tuning tries on a device, all of which fit into memory."""
  every = (TpuTiles(*shape) for shape in itertools.product((128, 256, 512, 1024), (512, 1024, 2048), (512, 1024, 2048)))
  return [tiles for tiles in every if tiles.vmem(of, x_dtype.itemsize, w_dtype.itemsize) <= VMEM]


def gpu_tiles(of: str, M: int, I: int, O: int, E: int, x_dtype, w_dtype) -> GpuTiles:
  """Tiles for a pass, from the table or by rule: the largest that two warpgroups hold in registers, with as many stages as
  fit, and half as many rows where groups are short on average, as in decoding."""
  if tuned := TUNED_GPU.get(key(of, M, I, O, E, x_dtype, w_dtype)): return tuned
  rows = 64 if of != 'wgrad' and M <= 64 * E else 128
  shape = {'forward': (rows, 64, 256), 'dgrad': (rows, 256, 64), 'wgrad': (64, 128, 256)}[of]
  return next(tiles for stages in range(8, 0, -1)
              if (tiles := GpuTiles(*shape, stages)).shared(of, w_dtype.itemsize) <= SHARED)


def gpu_candidates(of: str, w_dtype) -> list[GpuTiles]:
  """The tiles that tuning tries on a device, all of which fit into memory."""
  # Consumers split rows, or columns where rows are few or weights are converted, in shares that are multiples of 64.
  wide = [(M, width) for M in (64, 128) for width in (128, 192, 256)
          if width != 192 or (M == 128 and w_dtype.itemsize > 1)]
  shapes = {'forward': [(M, 64, O) for M, O in wide], 'dgrad': [(M, I, 64) for M, I in wide],
            'wgrad': [(64, 128, 128), (64, 128, 256), (64, 256, 128), (128, 128, 128)]}[of]
  every = (GpuTiles(*shape, stages, band, cluster) for shape in shapes for stages in (3, 4, 5, 6) for band in (4, 8, 16)
           for cluster in (1, 2))
  return [tiles for tiles in every if tiles.shared(of, w_dtype.itemsize) <= SHARED]
