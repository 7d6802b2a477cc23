"""Static sizes of the kernels' tiles. No tiles have been measured on a device yet: the tables are empty, and the rules
follow from the sizes of memories and matrix units alone."""
import dataclasses
import itertools

PASSES = ('forward', 'dgrad', 'wgrad')
MiB = 2 ** 20
VMEM = 48 * MiB       # bytes that a kernel may fill, of 64 (v5p, tpu7x) to 128 MiB
SHARED = 226 * 1024   # bytes of shared memory: the 227 KiB of a Hopper multiprocessor without the barriers


@dataclasses.dataclass(frozen=True)
class TpuTiles:
  """forward, dgrad, wgrad: rows of a tile in each pass; all inputs of a tile lie in VMEM, and for the gradient of the blocks
  (wgrad) all outputs too. stages: blocks in VMEM or in flight. group: blocks whose gradients are summed at a time."""
  forward: int = 1024
  dgrad: int = 512
  wgrad: int = 256
  stages: int = 16
  group: int = 128

  def vmem(self, of: str, I: int, O: int, U: int, V: int, itemsize: int) -> int:
    """Bytes of VMEM that a pass fills: two buffers of each copied array, float32 sums and one product."""
    if of == 'wgrad':
      return 2 * self.wgrad * (I + O) * itemsize + self.group * U * V * (4 + 2 * itemsize) + 4 * U * V
    rows, inputs, width = (self.forward, I, V) if of == 'forward' else (self.dgrad, O, U)
    return 2 * rows * (inputs + width) * itemsize + 8 * rows * width + self.stages * U * V * itemsize


@dataclasses.dataclass(frozen=True)
class GpuTiles:
  """Tiles of two consumer warpgroups, each of which has half of the rows, or for the gradient of the blocks half of the
  blocks.

  rows: rows of a tile of the result. inner: inputs of a step, or rows for the gradient of the blocks. stages: steps whose
  operands are in shared memory or in flight. band: tiles of rows that are swept over all columns together, so that they stay
  in the L2 cache.
  """
  rows: int = 256
  inner: int = 64
  stages: int = 4
  band: int = 16

  def shared(self, U: int, V: int) -> int:
    """Bytes of shared memory of the pass that needs the most: stages of both operands, and two pieces of each result."""
    U, V = (128 if size % 128 == 0 else 64 for size in (U, V))
    return self.stages * self.inner * 2 * (max(self.rows, 2 * U) + max(U, V)) + 4 * 64 * 64 * 2


# (M, I, O, U, V) -> tiles, as found on a device.
TUNED_TPU: dict[tuple, TpuTiles] = {}
TUNED_GPU: dict[tuple, GpuTiles] = {}


def tpu_tiles_for(M: int, I: int, O: int, U: int, V: int, itemsize: int) -> TpuTiles:
  """Tiles from the table. Otherwise the most rows that fit, because blocks are read once for each tile of rows, and about 1
  MiB of blocks in flight, because a copy takes about a microsecond, however small it is."""
  if tuned := TUNED_TPU.get((M, I, O, U, V)): return tuned
  tiles = TpuTiles(stages=min(max(4, MiB // (U * V * itemsize)), 32), group=max(1, 8 * MiB // (U * V * 4)))
  for of in PASSES:
    fit = (one for rows in (2048, 1024, 512, 256, 128, 64, 32, 16)
           if (one := dataclasses.replace(tiles, **{of: rows})).vmem(of, I, O, U, V, itemsize) <= VMEM)
    tiles = next(fit, tiles)
  return tiles


def tpu_candidates(I: int, O: int, U: int, V: int, itemsize: int) -> list[TpuTiles]:
  """The tiles that tuning tries on a device, all of which fit into memory: the same number of rows for all three passes."""
  every = (TpuTiles(rows, rows, rows, stages, group) for rows, stages, group in itertools.product(
    (128, 256, 512, 1024), (4, 8, 16, 32), (32, 64, 128, 256)))
  return [tiles for tiles in every if all(tiles.vmem(of, I, O, U, V, itemsize) <= VMEM for of in PASSES)]


def gpu_tiles_for(M: int, I: int, O: int, U: int, V: int) -> GpuTiles:
  """Tiles from the table, or else as many stages as fit."""
  if tuned := TUNED_GPU.get((M, I, O, U, V)): return tuned
  every = [GpuTiles(stages=stages) for stages in (6, 5, 4, 3, 2)]
  return next((tiles for tiles in every if tiles.shared(U, V) <= SHARED), every[-1])


def gpu_candidates(U: int, V: int) -> list[GpuTiles]:
  """The tiles that tuning tries on a device, all of which fit into memory."""
  every = (GpuTiles(*sizes) for sizes in itertools.product((128, 256), (64, 128), (2, 3, 4, 5, 6), (4, 8, 16, 32)))
  return [tiles for tiles in every if tiles.shared(U, V) <= SHARED and not U % tiles.inner and not V % tiles.inner]
