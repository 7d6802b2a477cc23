"""Static sizes of the kernels' tiles: those of the cross-entropy, whose product is the same. None of them has been measured
on a device yet: the defaults follow from arithmetic."""
from efficient_lm.ops.linear_cross_entropy.tiles import SHARED_MEMORY, VMEM, GpuTiles, TpuTiles

WIDTH = 32   # columns that a warpgroup of the GPU kernel processes and writes at a time

# (device family, 'forward' or 'backward', D, V) -> tiles, as found by tuning. The table is empty until a device has been
# tuned.
TUNED: dict = {}


def gpu_shared_memory(tiles: GpuTiles) -> int:
  """Bytes of 16-bit operands, of the gradients to be written, with two slots for each warpgroup, and of barriers."""
  operands = tiles.stages * tiles.inner * (2 * tiles.rows + tiles.columns) * 2
  return operands + 2 * 2 * tiles.rows * WIDTH * 2 + 1024


def tpu_vmem(tiles: TpuTiles, itemsize: int) -> int:
  """Bytes of VMEM: those of the cross-entropy, and two buffers of a tile of the other array."""
  return tiles.vmem(itemsize) + 2 * tiles.rows * tiles.columns * 4


def gpu_tiles_for(of: str, M: int, D: int, V: int, itemsize: int) -> GpuTiles:
  """The default tiles: the tuned ones, or else the largest that registers hold."""
  return TUNED.get(('hopper', of, D, V), GpuTiles())


def tpu_tiles_for(of: str, M: int, D: int, V: int, itemsize: int) -> TpuTiles:
  """The default tiles: the tuned ones, or else large tiles, cut to the arrays; inner divides D."""
  if ('tpu', of, D, V) in TUNED: return TUNED['tpu', of, D, V]
  rows, columns = min(512, -(-M // 16) * 16), min(1024, -(-V // 128) * 128)
  inner = max(size for size in range(128, 1025, 128) if D % size == 0)
  fitting = (TpuTiles(rows, min(columns, width), inner) for width in (1024, 512, 256, 128))
  return next(tiles for tiles in fitting if tpu_vmem(tiles, itemsize) <= VMEM)


def candidates(platform: str, D: int, itemsize: int = 2) -> tuple:
  """The tiles that tuning tries. All of them fit the memory that a kernel may use, and their sums fit registers."""
  if platform == 'gpu':
    # With 128 rows, WIDTH columns take as many registers as twice the columns with 64 rows, and the compiler spills.
    every = (GpuTiles(64, columns, 64, stages, band) for columns in (256, 128) for stages in (3, 4, 5, 6)
             for band in (8, 16, 32))
    return tuple(tiles for tiles in every if gpu_shared_memory(tiles) <= SHARED_MEMORY)
  every = (TpuTiles(rows, columns, inner) for rows in (256, 512, 1024) for columns in (512, 1024, 2048)
           for inner in (512, 1024, 2048) if D % inner == 0)
  return tuple(tiles for tiles in every if tpu_vmem(tiles, itemsize) <= VMEM)


__all__ = ['SHARED_MEMORY', 'TUNED', 'VMEM', 'WIDTH', 'GpuTiles', 'TpuTiles', 'candidates', 'gpu_shared_memory',
           'gpu_tiles_for', 'tpu_tiles_for', 'tpu_vmem']
