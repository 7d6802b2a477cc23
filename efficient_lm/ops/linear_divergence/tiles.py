"""Static sizes of the kernels' tiles: those of the cross-entropy, which multiply the same. None of them was measured on a
device yet: the defaults follow from arithmetic."""
from efficient_lm.ops.linear_cross_entropy.tiles import SHARED_MEMORY, VMEM, GpuTiles, TpuTiles

WIDTH = 32   # columns that a warpgroup of the GPU kernel works on, and writes, at a time

# (device family, 'forward' or 'backward', D, V) -> tiles, as found by tuning; empty until there was a device to tune on.
TUNED: dict = {}


def gpu_shared_memory(tiles: GpuTiles) -> int:
  """Bytes of 16-bit operands and of what the backward pass writes, two slots for each warpgroup, and of barriers."""
  operands = tiles.stages * tiles.inner * (2 * tiles.rows + tiles.columns) * 2
  return operands + 2 * 2 * tiles.rows * WIDTH * 2 + 1024


def tpu_vmem(tiles: TpuTiles, itemsize: int) -> int:
  """Bytes: those of the cross-entropy, and a tile of the other array twice."""
  return tiles.vmem(itemsize) + 2 * tiles.rows * tiles.columns * 4


def gpu_tiles_for(of: str, M: int, D: int, V: int, itemsize: int) -> GpuTiles:
  """What to use where nothing was given: as tuned, or else the largest tile that registers hold."""
  return TUNED.get(('hopper', of, D, V), GpuTiles())


def tpu_tiles_for(of: str, M: int, D: int, V: int, itemsize: int) -> TpuTiles:
  """What to use where nothing was given: as tuned, or else large tiles, cut down to the arrays; inner divides D."""
  if ('tpu', of, D, V) in TUNED: return TUNED['tpu', of, D, V]
  rows, columns = min(512, -(-M // 16) * 16), min(1024, -(-V // 128) * 128)
  inner = max(size for size in range(128, 1025, 128) if D % size == 0)
  fitting = (TpuTiles(rows, min(columns, width), inner) for width in (1024, 512, 256, 128))
  return next(tiles for tiles in fitting if tpu_vmem(tiles, itemsize) <= VMEM)


def candidates(platform: str, D: int, itemsize: int = 2) -> tuple:
  """What tuning should try: all of them fit the memory that a kernel may have, and the accumulator fits registers."""
  if platform == 'gpu':
    # Not 128 rows: WIDTH columns of them are as many registers as twice that of 64, with which the compiler spills.
    every = (GpuTiles(64, columns, 64, stages, band) for columns in (256, 128) for stages in (3, 4, 5, 6)
             for band in (8, 16, 32))
    return tuple(tiles for tiles in every if gpu_shared_memory(tiles) <= SHARED_MEMORY)
  every = (TpuTiles(rows, columns, inner) for rows in (256, 512, 1024) for columns in (512, 1024, 2048)
           for inner in (512, 1024, 2048) if D % inner == 0)
  return tuple(tiles for tiles in every if tpu_vmem(tiles, itemsize) <= VMEM)


__all__ = ['SHARED_MEMORY', 'TUNED', 'VMEM', 'WIDTH', 'GpuTiles', 'TpuTiles', 'candidates', 'gpu_shared_memory',
           'gpu_tiles_for', 'tpu_tiles_for', 'tpu_vmem']
