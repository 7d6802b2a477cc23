"""Static sizes of the tiles of the quantized products: M rows, O outputs, I inputs.

No tiles have been measured on a device yet: the tables of tuned tiles are empty, and the rules below follow from the sizes
  of memories and matrix units alone.
"""
import dataclasses
import itertools

from efficient_lm.ops.quantized_matmul.storage import QuantizedMatrix

MiB = 2 ** 20
# VMEM that a kernel may fill on a TPU, which has 64 (tpu7x) to 128 MiB; and shared memory of a block on Hopper. In bytes.
VMEM = 40 * MiB
SHARED = 227 * 1024 - 512


@dataclasses.dataclass(frozen=True)
class TpuTiles:
  """Tiles in VMEM. I counts bytes of a row of the weight: 1, 2 or 4 inputs each."""
  M: int
  O: int
  I: int

  def vmem(self, bits: int, x_bytes: int) -> int:
    """Bytes of VMEM: two buffers of each block, the sums, and the weight as 32-bit numbers and as the numbers multiplied."""
    per_byte = 8 // bits
    blocks = self.M * self.I * per_byte * x_bytes + self.O * self.I + self.M * self.O * 4
    return 2 * blocks + 4 * self.M * self.O + self.O * self.I * (4 + 4 + per_byte * x_bytes)


# (M, O, I, bits, Q, activations) -> tiles, as found on a device.
TUNED_TPU: dict[tuple, TpuTiles] = {}


def _key(M: int, w: QuantizedMatrix, activations: str | None) -> tuple:
  return M, *w.shape, w.bits, w.scale_QO.shape[0], activations


def steps_of(width: int, group: int, largest: int) -> int:
  """The longest step, at most `largest` bytes, that divides a row of `width` bytes, is a multiple of 128, and is a multiple
  or a divisor of the `group` bytes that share a scale; 0 if there is none."""
  fits = lambda step: width % step == 0 and (step % group == 0 or group % step == 0)
  return next((step for step in range(largest - largest % 128, 0, -128) if fits(step)), 0)


def tpu_tiles(M: int, w: QuantizedMatrix, activations: str | None) -> TpuTiles:
  """Tiles from the table or by rule. A tile has all rows where they are few, because reading the weight takes the time then;
  otherwise as many rows as make unpacking the weight cheap beside the product."""
  if tuned := TUNED_TPU.get(_key(M, w, activations)): return tuned
  rows = min(-(-M // 32) * 32, 512)
  width, group = w.values.shape[1], w.group * w.bits // 8
  outputs = min(-(-w.shape[0] // 128) * 128, 512)
  return TpuTiles(rows, outputs, steps_of(width, group, 1024 if w.bits == 8 else 512))


def tpu_candidates(M: int, w: QuantizedMatrix, activations: str | None) -> list[TpuTiles]:
  """The tiles that tuning tries on a device, all of which fit into memory."""
  width, group = w.values.shape[1], w.group * w.bits // 8
  steps = sorted({steps_of(width, group, largest) for largest in (256, 512, 1024, 2048)} - {0})
  rows = sorted({min(-(-M // 32) * 32, rows) for rows in (128, 256, 512, 1024)})
  every = itertools.starmap(TpuTiles, itertools.product(rows, (256, 512, 1024), steps))
  return [tiles for tiles in every if tiles.vmem(w.bits, 1 if activations else 4) <= VMEM]


@dataclasses.dataclass(frozen=True)
class FewTiles:
  """Tiles for few rows on a GPU: 64 outputs, in steps of I inputs.

  parts: blocks of threads that share an output, each with a part of the inputs. stages: steps in shared memory or in flight.
  """
  I: int
  parts: int
  stages: int = 4

  def shared(self, rows: int, w: QuantizedMatrix, rounded: bool) -> int:
    """Bytes of shared memory: stages of both operands and of scales, and the result if there is a single part."""
    scales = 0 if w.group == w.shape[1] else max(self.I // w.group, 1) * 64 * 4
    result = rows * 64 * 2 if self.parts == 1 else 0
    return self.stages * (self.I * (64 * w.bits + rows * (8 if rounded else 16)) // 8 + scales) + result


@dataclasses.dataclass(frozen=True)
class GpuTiles:
  """Tiles for many rows on a GPU: M rows and O outputs for two warpgroups, in steps of I inputs.

  stages: steps in shared memory or in flight. band: row tiles that are swept over all outputs together, so that the operands
  in use fit the L2 cache. cluster: blocks of threads that share the copies of a tile of the weight, or of x if x is a float.
  """
  M: int
  O: int
  I: int
  stages: int
  band: int = 8
  cluster: int = 1

  def shared(self, w: QuantizedMatrix, rounded: bool) -> int:
    """Bytes of shared memory: stages of both operands and of scales, and two pieces of the result for each warpgroup."""
    x_bits, w_bits, result = (8, 8, self.M // 2 * 64) if rounded else (16, w.bits, self.O // 2 * 32)
    scales = 0 if w.group == w.shape[1] else max(self.I // w.group, 1) * self.O * 2
    return self.stages * ((self.M * x_bits + self.O * w_bits) * self.I // 8 + scales) + 4 * result * 2


FEW_ROWS = 64
TUNED_GPU: dict[tuple, FewTiles | GpuTiles] = {}


def gpu_tiles(M: int, w: QuantizedMatrix, activations: str | None, num_cores: int = 132) -> FewTiles | GpuTiles | None:
  """Tiles from the table, or else the first candidate; None if none fits."""
  if tuned := TUNED_GPU.get(_key(M, w, activations)): return tuned
  return next(iter(gpu_candidates(M, w, activations, num_cores)), None)


def gpu_candidates(M: int, w: QuantizedMatrix, activations: str | None, num_cores: int = 132) -> list[FewTiles | GpuTiles]:
  """The tiles that tuning tries on a device, all of which fit into memory; the likeliest first."""
  if M <= FEW_ROWS: return _few_candidates(M, w, bool(activations), num_cores)
  O, I = w.shape
  shapes = [(128, 256), (256, 128), (128, 128), (128, 64)] if activations else [(128, 256), (256, 128), (128, 128)]
  every = [GpuTiles(rows, outputs, 128, stages, band, cluster) for rows, outputs in shapes
           for cluster in (2, 1) for band in (8, 4, 16) for stages in (4, 5, 3, 6)]
  # Rows are padded to a multiple of a cluster's tiles; outputs are not.
  fitting = [tiles for tiles in every if tiles.shared(w, bool(activations)) <= SHARED and I % tiles.I == 0
             and O % (tiles.O * (1 if activations else tiles.cluster)) == 0
             and (tiles.cluster == 1 or not activations or M > tiles.M)]
  idle = lambda tiles: .8 * num_cores > -(-M // tiles.M) * (O // tiles.O)
  return sorted(fitting, key=idle)   # The sort is stable: large tiles come first unless they are too few for the device.


def _few_candidates(M: int, w: QuantizedMatrix, rounded: bool, num_cores: int) -> list[FewTiles]:
  """Steps of about 8 KiB of the weight, and the fewest parts that give each multiprocessor two blocks (or the most
  possible), of which two fit a multiprocessor."""
  (O, I), rows = w.shape, max(8, 1 << (M - 1).bit_length())
  wanted = 2 * num_cores * 64 / O
  found = []
  for step in (256, 512, 128):
    if I % step or step * w.bits < 64 * 8: continue   # An operand of integers in registers has at least 64 bytes a row.
    parts = [parts for parts in range(1, 33) if I // step % parts == 0]
    enough = [p for p in parts if p >= wanted * .8] or parts[-1:]
    found += [FewTiles(step, p, stages) for p in enough[:2] for stages in (4, 6, 8, 2)]
  return [tiles for tiles in found if tiles.shared(rows, w, rounded) <= SHARED // 2]
