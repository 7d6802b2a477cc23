"""What a method of post-training quantization is, for `techniques.quantization.ptq.Quantize` to apply layer by layer."""
import dataclasses
from typing import Any


class Method:
  """How matrices are quantized after training. Subclasses are dataclasses that a config can hold.

  needs: names of the statistics that it wants of each weight's inputs (`weights.observed`); none: no calibration.
  carries_quantized: whether layers are calibrated on the outputs of quantized layers before them, or of float ones.
  true_sequential: whether that holds of the products within a layer, too.
  range: how scales are fitted; None for the format's own.
  prunes: the pattern of zeros that it makes beside those of earlier masks (`compression.patterns`); None: it makes none.
  """
  needs: tuple[str, ...] = ()
  carries_quantized = True
  true_sequential = False
  range: Any = None
  prunes = None

  def check_fits(self, weight, format):
    """Raises IncompatibleError for a float weight that it cannot store in this format."""

  def prepare(self, layer, found: dict[str, dict], formats: dict[str, Any]):
    """A float layer that computes the same and is easier to quantize, and the statistics of its weights.

    found: by path, those of each weight that is to be quantized, to `formats`."""
    return layer, found

  def encode(self, w_OI, format, statistics: dict, keep_OI=None):
    """A matrix (..., O, I) as `formats.Encoded`, by the statistics of its inputs; compiled once for each shape.

    keep_OI: bool, False where the matrix has been pruned and must stay zero; None where it has not."""
    raise NotImplementedError

  def without_data(self, w_OI, format, keep_OI=None):
    """As `encode`, of a matrix of whose inputs nothing is known: round-to-nearest (RTN)."""
    return format.encode(w_OI, format.scales_for(w_OI, self.range))


@dataclasses.dataclass(kw_only=True, unsafe_hash=True)
class RoundToNearest(Method):
  """RTN: each number by itself, no calibration; what any method falls back to where there is nothing to go by. `range`: of
  the scales, None for the format's own."""
  range: Any = None

  def encode(self, w_OI, format, statistics: dict, keep_OI=None): return self.without_data(w_OI, format)
