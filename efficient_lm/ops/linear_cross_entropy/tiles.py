"""Static sizes of the kernels' tiles. None of them was measured on a device yet: the defaults follow from arithmetic."""
import dataclasses

SHARED_MEMORY = 227 * 1024   # bytes that a block may have on Hopper
VMEM = 48 * 2 ** 20   # bytes that a TPU kernel may have here, of the 64 MiB and more that every TPU since v4 has


@dataclasses.dataclass(frozen=True)
class GpuTiles:
  """One block multiplies tiles of 2 * rows x columns, a warpgroup for each half.

  rows, columns: of the logits; a warpgroup holds rows x columns in registers, 64 x 256 or 128 x 128.
  inner: of the sum over D, for each step of the pipeline, of which `stages` are in flight.
  band: how many tiles of tokens are worked on side by side, so that what they share is in the L2 cache.
  """
  rows: int = 64
  columns: int = 256
  inner: int = 64
  stages: int = 4
  band: int = 16

  def shared_memory(self) -> int:
    """Bytes of 16-bit operands and of what the backward pass writes, two slots for each warpgroup, and of barriers."""
    operands = self.stages * self.inner * (2 * self.rows + self.columns) * 2
    return operands + 2 * 2 * self.rows * STORE_COLUMNS * 2 + 1024


STORE_COLUMNS = 64   # that a warpgroup writes at a time: 128 bytes, the widest swizzle


@dataclasses.dataclass(frozen=True)
class TpuTiles:
  """Tiles of the logits, rows x columns, and of the sum over D."""
  rows: int = 512
  columns: int = 1024
  inner: int = 1024

  def vmem(self, itemsize: int) -> int:
    """Bytes: both operands twice, the sum, about two more of its size for what is computed from it, the result twice."""
    operands = 2 * self.inner * (self.rows + self.columns) * itemsize
    return operands + self.rows * self.columns * (3 * 4 + 2 * itemsize)


# (device family, 'forward' or 'backward', D, V) -> tiles, as found by tuning; empty until there was a device to tune on.
TUNED: dict = {}


def gpu_tiles_for(of: str, M: int, D: int, V: int, itemsize: int) -> GpuTiles:
  """What to use where nothing was given: as tuned, or else the largest tile that registers hold."""
  return TUNED.get(('hopper', of, D, V), GpuTiles())


def tpu_tiles_for(of: str, M: int, D: int, V: int, itemsize: int) -> TpuTiles:
  """What to use where nothing was given: as tuned, or else large tiles, cut down to the arrays; inner divides D."""
  if ('tpu', of, D, V) in TUNED: return TUNED['tpu', of, D, V]
  inner = max(size for size in range(128, 1025, 128) if D % size == 0) if D % 128 == 0 else D
  rows = min(512, -(-M // 16) * 16)
  tiles = TpuTiles(rows, min(1024, -(-V // 128) * 128), inner)
  return tiles if tiles.vmem(itemsize) <= VMEM else dataclasses.replace(tiles, rows=min(rows, 256), columns=512)


def candidates(platform: str, D: int, itemsize: int = 2) -> tuple:
  """What tuning should try: all of them fit the memory that a kernel may have, and the accumulator fits registers."""
  if platform == 'gpu':
    every = (GpuTiles(rows, columns, 64, stages, band) for rows, columns in ((64, 256), (128, 128), (64, 128))
             for stages in (3, 4, 5, 6) for band in (8, 16, 32))
    return tuple(tiles for tiles in every if tiles.shared_memory() <= SHARED_MEMORY)
  every = (TpuTiles(rows, columns, inner) for rows in (256, 512, 1024) for columns in (512, 1024, 2048)
           for inner in (512, 1024, 2048) if D % inner == 0)
  return tuple(tiles for tiles in every if tiles.vmem(itemsize) <= VMEM)
