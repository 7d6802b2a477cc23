"""Sizes of the pieces that the kernels of decode attention work on. Nothing here was measured on a device yet."""
import dataclasses

SHARED_MEMORY = 227 * 1024   # bytes a block of threads may have on Hopper
VMEM = 12 * 2 ** 20          # bytes of a TPU core's VMEM that a kernel may fill, of the 16 MiB that every generation grants


@dataclasses.dataclass(frozen=True)
class TpuTiles:
  """slots: tokens of a head that one grid step reads; with pages, a multiple of a page."""
  slots: int


@dataclasses.dataclass(frozen=True)
class GpuTiles:
  """split: tokens of a head that one block of threads reads. slots: those of one copy. stages: copies in flight.

  registers: whether quantized keys are converted on the way to the tensor cores, or into shared memory as values are: more
  traffic there, but the only form that the GPU interpreter of JAX knows.
  """
  split: int
  slots: int = 64
  stages: int = 3
  registers: bool = True


# (platform, sequences times key heads, slots, head dim, bits a number) -> tiles, measured. Empty: no device has run them.
TUNED: dict[tuple[str, int, int, int, int], TpuTiles | GpuTiles] = {}


def tpu_tiles_for(heads: int, S: int, H: int, bits: int, page: int | None) -> TpuTiles:
  """About 256 KiB of keys a step, to hide a step's fixed cost, as pages and the length of the cache allow."""
  if tuned := TUNED.get(('tpu', heads, S, H, bits)): return tuned
  slots = max(128, min(4096, 2 ** 18 * 8 // (H * bits)))
  if page is not None: return TpuTiles(page * max(1, min(slots // page, 8, S // page)))
  return TpuTiles(S if slots >= S else slots)


def gpu_tiles_for(heads: int, S: int, H: int, bits: int, num_cores: int) -> GpuTiles:
  """The longest split, of those that let three blocks of threads share a multiprocessor, that still gives each four of them:
  long ones have fewer partial results."""
  if tuned := TUNED.get(('gpu', heads, S, H, bits)): return tuned
  split = 512
  while split > 256 and heads * -(-S // split) < 4 * num_cores: split //= 2
  return GpuTiles(split)


def shared_memory(tiles: GpuTiles, H: int, bits: int, columns: int = 8) -> int:
  """Bytes of shared memory that the GPU kernel takes: copies in flight with their scales, converted values, scores of the
  split, probabilities, queries and results, and 8 KiB for alignment, barriers and reductions."""
  copies = tiles.stages * tiles.slots * (H * bits // 8 + (4 if bits <= 8 else 0))
  converted = tiles.slots * H * 2 if bits <= 8 else 0
  return copies + converted + columns * (4 * tiles.split + 2 * tiles.slots + 2 * H + 4 * H + 8) + 8192


def candidates(platform: str, S: int, H: int, bits: int, page: int | None = None) -> list[TpuTiles | GpuTiles]:
  """What tuning should try, all of which fit."""
  if platform == 'tpu':
    return [TpuTiles(slots) for slots in (512, 1024, 2048, 4096)
            if slots <= S and not slots % (page or 1) and 4 * slots * max(H * bits // 8, 128) <= VMEM]
  every = (GpuTiles(split, slots, stages) for split in (256, 512, 1024) for slots in (64, 128) for stages in (2, 3, 4, 6))
  # Two blocks of threads to a multiprocessor at least: one waits for memory while the other computes.
  return [tiles for tiles in every if 2 * shared_memory(tiles, H, bits) <= SHARED_MEMORY and not (page or 0) % tiles.slots]
