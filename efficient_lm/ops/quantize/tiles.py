"""Sizes of the tiles of the quantization kernels. None of them has been measured on a device yet."""
import dataclasses
import itertools
import math

SHARED_MEMORY = 227 * 1024   # bytes a block of threads may have on Hopper
VMEM = 12 * 2 ** 20   # bytes of a TPU core's VMEM that a kernel may fill, of the 16 MiB that every generation grants


@dataclasses.dataclass(frozen=True)
class TpuTiles:
  """rows: of one grid step, a multiple of 32."""
  rows: int


@dataclasses.dataclass(frozen=True)
class GpuTiles:
  """rows: those that one block of threads processes one after another. stages: rows whose copies may be in flight."""
  rows: int
  stages: int = 3


# (platform, M, I, bytes a number) -> tiles, as measured on a device. The table is empty: no device has run the kernels.
TUNED: dict[tuple[str, int, int, int], TpuTiles | GpuTiles] = {}


def vmem(tiles: TpuTiles, I: int, itemsize: int) -> int:
  """Bytes of VMEM that the TPU kernel takes: two buffers of x and of the values, and about three copies in float32."""
  return tiles.rows * I * (2 * itemsize + 2 + 12)


def candidates(platform: str, I: int, itemsize: int) -> list[TpuTiles | GpuTiles]:
  """The tiles that tuning tries, all of which fit into memory."""
  if platform == 'tpu': return [tiles for tiles in map(TpuTiles, (32, 64, 128, 256)) if vmem(tiles, I, itemsize) <= VMEM]
  every = (GpuTiles(rows, stages) for rows in (1, 4, 8, 16) for stages in (2, 3, 4))
  return [tiles for tiles in every if shared_memory(tiles, I, itemsize) <= SHARED_MEMORY]


def factors_for(I: int, block: int, itemsize: int) -> tuple[int, ...]:
  """The factors of a Hadamard block for the passes of the GPU kernel, as few as possible; () if there are none. Each factor
  leaves a multiple of a warpgroup's threads; the last one is 16, the least bytes that rows of a copy may have."""
  for passes in (1, 2):
    for factors in itertools.combinations_with_replacement((2, 4, 8, 16), passes):
      numbers = I // factors[0] * itemsize // 4   # words that the first pass loads at a time
      if math.prod(factors) * 16 == block and numbers % 128 == I // 16 % 128 == 0: return *factors, 16
  return ()


def padded(row: tuple[int, ...]) -> tuple[int, ...]:
  """(blocks, f1, …, fp) with f1 and fp larger by one, so that neighbouring threads use different banks of shared memory."""
  blocks, first, *middle, last = row
  return blocks, first + 1, *middle, last + 1


def shared_memory(tiles: GpuTiles, I: int, itemsize: int, factors: tuple[int, ...] = ()) -> int:
  """Bytes of shared memory that the GPU kernel takes: rows in flight, two rows of values, one row of float32 for a rotation,
  and 8 KiB for barriers and reductions."""
  rotated = 4 * math.prod(padded((I // math.prod(factors), *factors))) if factors else 0
  return I * (tiles.stages * itemsize + 2) + rotated + 8192


def tpu_tiles_for(M: int, I: int, itemsize: int) -> TpuTiles:
  """The tuned tiles, or else as many rows as fit, up to 256."""
  return TUNED.get(('tpu', M, I, itemsize)) or max(candidates('tpu', I, itemsize), key=lambda tiles: tiles.rows)


def gpu_tiles_for(M: int, I: int, itemsize: int) -> GpuTiles:
  """The tuned tiles, or else so many rows that starting a block of threads takes little of its time, but so few that every
  multiprocessor has some."""
  rule = GpuTiles(rows=max(1, min(8, M // 1024)), stages=2 if I * itemsize > 32768 else 3)
  return TUNED.get(('gpu', M, I, itemsize), rule)
