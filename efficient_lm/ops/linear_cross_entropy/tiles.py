"""Static sizes of the kernels' tiles. None of them has been measured on a device yet: the defaults follow from
arithmetic."""
import dataclasses

SHARED_MEMORY = 227 * 1024   # bytes that a block may have on Hopper
VMEM = 48 * 2 ** 20   # bytes that a TPU kernel may have here, of the 64 MiB and more that every TPU since v4 has


@dataclasses.dataclass(frozen=True)
class GpuTiles:
  """A block computes tiles of 2 * rows x columns of the logits, with a warpgroup for each half.

  rows, columns: those that a warpgroup holds in registers, 64 x 256 or 128 x 128.
  inner: the part of D of one step of the pipeline. stages: steps in flight.
  band: tiles of tokens that are computed side by side, so that the operands that they share stay in the L2 cache.
  """
  rows: int = 64
  columns: int = 256
  inner: int = 64
  stages: int = 4
  band: int = 16

  def shared_memory(self) -> int:
    """Bytes of 16-bit operands, of the gradients to be written, with two slots for each warpgroup, and of barriers."""
    operands = self.stages * self.inner * (2 * self.rows + self.columns) * 2
    return operands + 2 * 2 * self.rows * STORE_COLUMNS * 2 + 1024


STORE_COLUMNS = 64   # columns that a warpgroup writes at a time: 128 bytes, the widest swizzle


@dataclasses.dataclass(frozen=True)
class TpuTiles:
  """Tiles of the logits, rows x columns, and of the sum over D."""
  rows: int = 512
  columns: int = 1024
  inner: int = 1024

  def vmem(self, itemsize: int) -> int:
    """Bytes of VMEM: two buffers of both operands, the sums, about twice as much for what is computed from the sums, and two
    buffers of the result."""
    operands = 2 * self.inner * (self.rows + self.columns) * itemsize
    return operands + self.rows * self.columns * (3 * 4 + 2 * itemsize)


# (device family, 'forward' or 'backward', D, V) -> tiles, as found by tuning. The table is empty until a device has been
# tuned.
TUNED: dict = {}


def gpu_tiles_for(of: str, M: int, D: int, V: int, itemsize: int) -> GpuTiles:
  """The default tiles: the tuned ones, or else the largest that registers hold."""
  return TUNED.get(('hopper', of, D, V), GpuTiles())


def tpu_tiles_for(of: str, M: int, D: int, V: int, itemsize: int) -> TpuTiles:
  """The default tiles: the tuned ones, or else large tiles, cut to the arrays; inner divides D."""
  if ('tpu', of, D, V) in TUNED: return TUNED['tpu', of, D, V]
  inner = max(size for size in range(128, 1025, 128) if D % size == 0) if D % 128 == 0 else D
  rows = min(512, -(-M // 16) * 16)
  tiles = TpuTiles(rows, min(1024, -(-V // 128) * 128), inner)
  return tiles if tiles.vmem(itemsize) <= VMEM else dataclasses.replace(tiles, rows=min(rows, 256), columns=512)


def candidates(platform: str, D: int, itemsize: int = 2) -> tuple:
  """The tiles that tuning tries. All of them fit the memory that a kernel may use, and their sums fit registers."""
  if platform == 'gpu':
    every = (GpuTiles(rows, columns, 64, stages, band) for rows, columns in ((64, 256), (128, 128), (64, 128))
             for stages in (3, 4, 5, 6) for band in (8, 16, 32))
    return tuple(tiles for tiles in every if tiles.shared_memory() <= SHARED_MEMORY)
  every = (TpuTiles(rows, columns, inner) for rows in (256, 512, 1024) for columns in (512, 1024, 2048)
           for inner in (512, 1024, 2048) if D % inner == 0)
  return tuple(tiles for tiles in every if tiles.vmem(itemsize) <= VMEM)
