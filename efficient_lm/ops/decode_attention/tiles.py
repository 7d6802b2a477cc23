"""Sizes of the tiles of the decode attention kernels. None of them has been measured on a device yet."""
import dataclasses
import itertools

SHARED_MEMORY = 227 * 1024   # bytes a block of threads may have on Hopper
VMEM = 12 * 2 ** 20          # bytes of a TPU core's VMEM that a kernel may fill, of the 16 MiB that every generation grants


@dataclasses.dataclass(frozen=True)
class TpuTiles:
  """slots: tokens of a head that one step of the grid reads; with pages, a multiple of a page."""
  slots: int


@dataclasses.dataclass(frozen=True)
class GpuTiles:
  """splits: blocks of threads that share the tokens of a head. part: tokens whose scores are in shared memory at a time.
  slots: tokens of one copy, a divisor of `part`. stages: copies in flight."""
  splits: int
  part: int = 512
  slots: int = 64
  stages: int = 3


# (platform, sequences times key heads, slots, head dim, bits a number) -> tiles, as measured on a device. The table is
# empty: no device has run the kernels.
TUNED: dict[tuple[str, int, int, int, int], TpuTiles | GpuTiles] = {}


def tpu_tiles_for(heads: int, S: int, H: int, bits: int, page: int | None) -> TpuTiles:
  """The tuned tiles, or else about 256 KiB of keys in a step, which hide its fixed cost, as pages and the cache's length
  allow."""
  if tuned := TUNED.get(('tpu', heads, S, H, bits)): return tuned
  slots = max(128, min(4096, 2 ** 18 * 8 // (H * bits)))
  if page is not None: return TpuTiles(page * max(1, min(slots // page, 8, S // page)))
  return TpuTiles(S if slots >= S else slots)


def gpu_tiles_for(heads: int, S: int, H: int, bits: int, num_cores: int) -> GpuTiles:
  """The tuned tiles, or else the fewest splits that give each multiprocessor three blocks of threads, because joining
  partial results is extra work."""
  return TUNED.get(('gpu', heads, S, H, bits)) or GpuTiles(_splits(heads, S, 3 * num_cores))


def _splits(heads: int, S: int, blocks: int) -> int:
  return max(1, min(-(-blocks // heads), S // 256))


def shared_memory(tiles: GpuTiles, H: int, bits: int, columns: int = 8) -> int:
  """Bytes of shared memory that the GPU kernel takes: copies in flight with their scales, converted values, the scores of a
  part, probabilities, queries, the results of a split, and 8 KiB for alignment, barriers and reductions."""
  copies = tiles.stages * tiles.slots * (H * bits // 8 + (4 if bits <= 8 else 0))
  converted = tiles.slots * H * 2 if bits <= 8 else 0
  results = 4 * H + 8 if tiles.splits > 1 else 0
  return copies + converted + columns * (4 * tiles.part + 2 * tiles.slots + 2 * H + results) + 8192


def candidates(platform: str, S: int, H: int, bits: int, page: int | None = None,
               heads: int = 64) -> list[TpuTiles | GpuTiles]:
  """The tiles that tuning tries, all of which fit into memory."""
  if platform == 'tpu':
    return [TpuTiles(slots) for slots in (512, 1024, 2048, 4096)
            if slots <= S and not slots % (page or 1) and 4 * slots * max(H * bits // 8, 128) <= VMEM]
  splits = sorted({_splits(heads, S, blocks * 132) for blocks in (2, 3, 4, 6)})
  every = (GpuTiles(*sizes) for sizes in itertools.product(splits, (256, 512, 1024), (64, 128), (2, 3, 4, 6)))
  # At least two blocks of threads fit a multiprocessor, so that one waits for memory while the other computes.
  return [tiles for tiles in every if 2 * shared_memory(tiles, H, bits) <= SHARED_MEMORY and not (page or 0) % tiles.slots]
