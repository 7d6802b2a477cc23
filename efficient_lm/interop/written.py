"""A model on its way out, in the words of Hugging Face, before any writer has chosen how its bytes lie.

`write.py` makes one of a model; folders, compressed-tensors and GGUF files are written from it. What GPTQ, AWQ or
quantization-aware training has chosen arrives here as the numbers on the grid and their scales, never as floats that a
writer would have to round once more.

Alphabet: O outputs, I inputs, Q groups of inputs that share a scale.
"""
import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from efficient_lm.formats import Format


@dataclasses.dataclass(frozen=True)
class Stored:
  """A matrix in few bits: format.from_steps(numbers, step, zero), a step and a zero for each row and group of I / Q inputs.

  numbers_OI: int8 codes of an integer format, float32 numbers of another, exact, in steps. step_OQ: float32. zero_OQ:
  float32, or None, as `format.steps` has it. format: that of the weight; activations: the format that its products round
  tokens to, or None.
  """
  numbers_OI: np.ndarray
  step_OQ: np.ndarray
  zero_OQ: np.ndarray | None
  format: Format
  activations: Format | None = None

  @property
  def shape(self) -> tuple[int, int]: return self.numbers_OI.shape

  def dequantized(self) -> np.ndarray:
    """(O, I) float32: the values that the model multiplies by, bit for bit."""
    O, Q = self.step_OQ.shape
    numbers_OQi = self.numbers_OI.reshape(O, Q, -1).astype(np.float32)
    zero = None if self.zero_OQ is None else self.zero_OQ[..., None]
    return self.format.from_steps(numbers_OQi, self.step_OQ[..., None], zero).reshape(self.shape)


@dataclasses.dataclass(frozen=True)
class Written:
  """config: as a config.json. tensors: by the names of Hugging Face, each an array in the orientation of its file, in
  float32, bfloat16 or float16, or a matrix (outputs, inputs) in few bits. notes: what is no longer as it was, in whole
  sentences."""
  config: Mapping[str, Any]
  tensors: Mapping[str, np.ndarray | Stored]
  notes: tuple[str, ...] = ()

  def floats(self) -> dict[str, np.ndarray]:
    """All tensors, those in few bits dequantized to float32."""
    return {name: one.dequantized() if isinstance(one, Stored) else one for name, one in self.tensors.items()}
