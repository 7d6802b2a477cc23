"""Sizes of the pieces that the kernels of quantization work on. Nothing here was measured on a device yet."""
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
  """rows: that one block of threads does one after another, the next one's copy in flight; stages: such copies."""
  rows: int
  stages: int = 3


# (platform, M, D, bytes a number) -> tiles, measured. Empty: no device has run them.
TUNED: dict[tuple[str, int, int, int], TpuTiles | GpuTiles] = {}


def vmem(tiles: TpuTiles, D: int, itemsize: int) -> int:
  """Bytes of VMEM that the TPU kernel takes: two copies of x and of the values, and about three of the row in float32."""
  return tiles.rows * D * (2 * itemsize + 2 + 12)


def candidates(platform: str, D: int, itemsize: int) -> list[TpuTiles | GpuTiles]:
  """What tuning should try, all of which fit."""
  if platform == 'tpu': return [tiles for tiles in map(TpuTiles, (32, 64, 128, 256)) if vmem(tiles, D, itemsize) <= VMEM]
  every = (GpuTiles(rows, stages) for rows in (1, 4, 8, 16) for stages in (2, 3, 4))
  return [tiles for tiles in every if shared_memory(tiles, D, itemsize) <= SHARED_MEMORY]


def factors_for(D: int, hadamard: int, itemsize: int) -> tuple[int, ...]:
  """Factors of a Hadamard block for the passes of the GPU kernel, as few as can be; () if there are none. Each leaves as
  many numbers as a warpgroup has threads, or a multiple; the last is 16, the least bytes that rows of a copy may have."""
  for passes in (1, 2):
    for factors in itertools.combinations_with_replacement((2, 4, 8, 16), passes):
      numbers = D // factors[0] * itemsize // 4   # that are loaded at a time: words, from which the first pass makes numbers
      if math.prod(factors) * 16 == hadamard and numbers % 128 == D // 16 % 128 == 0: return *factors, 16
  return ()


def padded(row: tuple[int, ...]) -> tuple[int, ...]:
  """(blocks, f1, …, fp) with one more in f1 and fp: neighbouring threads then use different banks of shared memory."""
  blocks, first, *middle, last = row
  return blocks, first + 1, *middle, last + 1


def shared_memory(tiles: GpuTiles, D: int, itemsize: int, factors: tuple[int, ...] = ()) -> int:
  """Bytes of shared memory that the GPU kernel takes: rows in flight, two rows of values, one of float32 that is being
  rotated, and 8 KiB for the rest."""
  rotated = 4 * math.prod(padded((D // math.prod(factors), *factors))) if factors else 0
  return D * (tiles.stages * itemsize + 2) + rotated + 8192


def tpu_tiles_for(M: int, D: int, itemsize: int) -> TpuTiles:
  """As many rows as fit, up to 256."""
  return TUNED.get(('tpu', M, D, itemsize)) or max(candidates('tpu', D, itemsize), key=lambda tiles: tiles.rows)


def gpu_tiles_for(M: int, D: int, itemsize: int) -> GpuTiles:
  """Enough rows that starting a block of threads is little of its time, few enough that every multiprocessor has some."""
  rule = GpuTiles(rows=max(1, min(8, M // 1024)), stages=2 if D * itemsize > 32768 else 3)
  return TUNED.get(('gpu', M, D, itemsize), rule)
