"""Static sizes of the kernels' tiles. None was measured on a device yet: the tables are empty, and the rules follow from the
sizes of memories and matrix units alone."""
import dataclasses
import itertools

MiB = 2 ** 20
VMEM = 48 * MiB       # of 64 (v5p, tpu7x) to 128
SHARED = 226 * 1024   # of the 227 KiB of a Hopper multiprocessor, less barriers


@dataclasses.dataclass(frozen=True)
class TpuTiles:
  """rows: of a tile of x, all of whose inputs lie in VMEM; stages: blocks in VMEM or under way. For the gradient of blocks,
  wgrad_rows: of a tile of x and g; group: blocks summed at a time."""
  rows: int = 1024
  stages: int = 4
  wgrad_rows: int = 256
  group: int = 128

  def vmem(self, K: int, N: int, I: int, J: int, itemsize: int) -> int:
    """Bytes that the hungriest of the three passes fills: two buffers of what is copied, float32 sums, one product."""
    def product(inputs, width):
      return 2 * self.rows * (inputs + width) * itemsize + 8 * self.rows * width + self.stages * I * J * itemsize
    gradient = 2 * self.wgrad_rows * (K + N) * itemsize + self.group * I * J * (4 + 2 * itemsize)
    return max(product(K, J), product(N, I), gradient)


@dataclasses.dataclass(frozen=True)
class GpuTiles:
  """Tiles of two consumer warpgroups, each of which has half of the rows, for the gradient of blocks half of the blocks.

  rows: of a tile of the result. inner: inputs of a step, rows for the gradient of blocks. stages: steps whose operands are in
  shared memory or under way. band: tiles of rows that are swept over all columns together, for the L2 cache.
  """
  rows: int = 256
  inner: int = 64
  stages: int = 4
  band: int = 16

  def shared(self, I: int, J: int) -> int:
    """Bytes of shared memory that the hungriest pass fills: stages of both operands, and two pieces of each one's result."""
    I, J = (128 if size % 128 == 0 else 64 for size in (I, J))
    return self.stages * self.inner * 2 * (max(self.rows, 2 * I) + max(I, J)) + 4 * 64 * 64 * 2


# (M, K, N, I, J) -> tiles, as found on a device.
TUNED_TPU: dict[tuple, TpuTiles] = {}
TUNED_GPU: dict[tuple, GpuTiles] = {}


def tpu_tiles_for(M: int, K: int, N: int, I: int, J: int, itemsize: int) -> TpuTiles:
  """From the table, or the most rows that fit: the blocks are read once for each tile of rows."""
  if tuned := TUNED_TPU.get((M, K, N, I, J)): return tuned
  group = max(1, 8 * MiB // (I * J * 4))
  every = [TpuTiles(rows, 4, min(rows, 512), group) for rows in (2048, 1024, 512, 256, 128, 64, 32, 16)]
  return next((tiles for tiles in every if tiles.vmem(K, N, I, J, itemsize) <= VMEM), every[-1])


def tpu_candidates(K: int, N: int, I: int, J: int, itemsize: int) -> list[TpuTiles]:
  """Tiles worth trying on a device, all of which fit."""
  every = (TpuTiles(*sizes) for sizes in itertools.product((256, 512, 1024, 2048), (3, 4, 8), (256, 512), (64, 128, 256)))
  return [tiles for tiles in every if tiles.vmem(K, N, I, J, itemsize) <= VMEM]


def gpu_tiles_for(M: int, K: int, N: int, I: int, J: int) -> GpuTiles:
  """From the table, or as many stages as fit."""
  if tuned := TUNED_GPU.get((M, K, N, I, J)): return tuned
  every = [GpuTiles(stages=stages) for stages in (6, 5, 4, 3, 2)]
  return next((tiles for tiles in every if tiles.shared(I, J) <= SHARED), every[-1])


def gpu_candidates(I: int, J: int) -> list[GpuTiles]:
  """Tiles worth trying on a device, all of which fit."""
  every = (GpuTiles(*sizes) for sizes in itertools.product((128, 256), (64, 128), (2, 3, 4, 5, 6), (4, 8, 16, 32)))
  return [tiles for tiles in every if tiles.shared(I, J) <= SHARED and not I % tiles.inner and not J % tiles.inner]
