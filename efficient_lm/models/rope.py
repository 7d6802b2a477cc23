"""Rotary position embedding (RoPE) and its scalings, as a config says them: which frequencies positions turn by.

Scalings make a model read texts longer than those it was trained on. Their frequencies are constants, float32, computed once
from the description. They, and the order of their operations, are those of `modeling_rope_utils.py` of transformers 5.
"""
import dataclasses
import math
from typing import Any

from efficient_lm.lazy import lazy
from efficient_lm.models.added import added

np = lazy('numpy')
config = dataclasses.dataclass(kw_only=True, unsafe_hash=True)
LAYOUTS = ('half', 'interleaved')


def _check_factor(scaling):
  if not scaling.factor >= 1: yield 'factor', scaling.factor, 'must be at least 1'


def _check_length(scaling):
  if scaling.original_length < 1: yield 'original_length', scaling.original_length, 'must be at least 1'


def _plain(dim: int, theta: float):
  """theta^(-2i/dim), float32 (dim / 2,)."""
  return np.float32(1) / np.float32(theta) ** (np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim))


@config
class LinearScaling:
  """All frequencies divided by `factor`: positions are interpolated (Chen et al. 2023, arXiv 2306.15595)."""
  factor: float

  magnitude = softmax = 1.0

  def check(self): yield from _check_factor(self)

  def frequencies(self, dim: int, theta: float):
    """Radians a position, float32 (dim / 2,)."""
    return _plain(dim, theta) / np.float32(self.factor)


@config
class Llama3Scaling:
  """That of Llama 3.1: frequencies with at least `high_freq_factor` turns in `original_length` tokens stay, those with at
  most `low_freq_factor` are divided by `factor`, and in between a share is that is linear in the number of turns."""
  factor: float
  low_freq_factor: float
  high_freq_factor: float
  original_length: int

  magnitude = softmax = 1.0

  def check(self):
    yield from _check_factor(self)
    yield from _check_length(self)
    if self.low_freq_factor <= 0: yield 'low_freq_factor', self.low_freq_factor, 'must be positive'
    if self.high_freq_factor <= self.low_freq_factor:
      yield 'high_freq_factor', self.high_freq_factor, f'must be above low_freq_factor = {self.low_freq_factor}'

  def frequencies(self, dim: int, theta: float):
    """Radians a position, float32 (dim / 2,)."""
    plain, number = _plain(dim, theta), np.float32
    turns = number(self.original_length) / (number(2 * math.pi) / plain)
    stays = (turns - number(self.low_freq_factor)) / number(self.high_freq_factor - self.low_freq_factor)
    between = (1 - stays) * plain / number(self.factor) + stays * plain
    slow, fast = turns < number(self.low_freq_factor), turns > number(self.high_freq_factor)
    return np.where(slow, plain / number(self.factor), np.where(fast, plain, between)).astype(np.float32)


@config
class Yarn:
  """YaRN (Peng et al. 2023, arXiv 2309.00071, section 3): dimensions that turn more than `beta_fast` times in
  `original_length` tokens keep their frequency, those that turn less than `beta_slow` times have it divided by `factor`, and
  a ramp over dimensions lies in between (`truncate`: between whole dimensions). cos and sin are multiplied by
  `attention_factor`, by default 0.1 ln(factor) + 1, or, where `mscale` and `mscale_all_dim` are given (DeepSeek), by the
  quotient of 0.1 m ln(factor) + 1 for both of them; `Latent` attention then multiplies its scores by the square of the
  second."""
  factor: float
  original_length: int
  beta_fast: float = 32.0
  beta_slow: float = 1.0
  attention_factor: float | None = None
  mscale: float | None = None
  mscale_all_dim: float | None = None
  truncate: bool = True

  def check(self):
    yield from _check_factor(self)
    yield from _check_length(self)
    if self.beta_slow <= 0: yield 'beta_slow', self.beta_slow, 'must be positive'
    if self.beta_fast <= self.beta_slow: yield 'beta_fast', self.beta_fast, f'must be above beta_slow = {self.beta_slow}'
    if self.attention_factor is not None and self.attention_factor <= 0:
      yield 'attention_factor', self.attention_factor, 'must be positive, or None'

  @property
  def magnitude(self) -> float:
    """What cos and sin are multiplied by."""
    if self.attention_factor is not None: return self.attention_factor
    if self.mscale and self.mscale_all_dim: return self._factor(self.mscale) / self._factor(self.mscale_all_dim)
    return self._factor(1.0)

  @property
  def softmax(self) -> float:
    """What `Latent` attention multiplies its scores by."""
    return self._factor(self.mscale_all_dim) ** 2 if self.mscale_all_dim else 1.0

  def frequencies(self, dim: int, theta: float):
    """Radians a position, float32 (dim / 2,)."""
    low, high = (self._dimension(turns, dim, theta) for turns in (self.beta_fast, self.beta_slow))
    if self.truncate: low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high: high += 0.001
    ramp = np.clip((np.arange(dim // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low), 0, 1)
    stays = np.float32(1) - ramp
    power = np.float32(theta) ** (np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim))
    return (1 / (np.float32(self.factor) * power) * (1 - stays) + 1 / power * stays).astype(np.float32)

  def _factor(self, mscale: float) -> float:
    return 0.1 * mscale * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0

  def _dimension(self, turns: float, dim: int, theta: float) -> float:
    """The dimension that makes so many turns in the original length."""
    return dim * math.log(self.original_length / (turns * 2 * math.pi)) / (2 * math.log(theta))


@config
class Rope:
  """Rotary position embedding (Su et al. 2021). Layout 'half' rotates dimension i with i + H/2 (Llama as published by
  Hugging Face), 'interleaved' rotates 2i with 2i + 1 (the paper, GPT-J, DeepSeek). `scaling` None: none."""
  theta: float = 10_000.0
  layout: str = 'half'
  scaling: Any = added(None)

  def check(self):
    if self.theta <= 0: yield 'theta', self.theta, 'must be positive'
    if self.layout not in LAYOUTS: yield 'layout', self.layout, f'must be one of {", ".join(map(repr, LAYOUTS))}'
    if isinstance(self.scaling, Yarn) and self.theta <= 1: yield 'theta', self.theta, 'must be above 1 with Yarn'
