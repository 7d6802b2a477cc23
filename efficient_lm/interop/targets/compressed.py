"""A folder in the format of the library compressed-tensors: matrices in few bits as vLLM and transformers read them.

All matrices in few bits have one scheme: transformers 5.24 takes the first that `quantization_config` names for all of them,
whatever else is named there. Codes are written as they are: what GPTQ or training has chosen is not rounded again.
"""
import dataclasses
import re
from typing import Any

from efficient_lm.errors import IncompatibleError
from efficient_lm.interop.targets.folder import files, save, transformers_logits

FUSED = (('q_proj', 'k_proj', 'v_proj'), ('gate_proj', 'up_proj'), ('w1', 'w3'))   # that engines join into one matrix
OUTSIDE = ('lm_head', 'embed_tokens', 'wte')


@dataclasses.dataclass(kw_only=True)
class CompressedTensors:
  """Weights of 4 bits in groups (W4A16), of 8 bits (W8A8 where tokens are rounded as well, W8A16 otherwise), or in float8
  (FP8), symmetric. `dtype`: of what stays in floats, and of scales; None: as the model holds it, scales in float32."""
  dtype: str | None = None

  title = 'Hugging Face folder in few bits'
  independent = 'transformers with compressed-tensors'

  def check(self):
    if self.dtype not in (None, 'float32', 'bfloat16', 'float16'):
      yield 'dtype', self.dtype, 'must be float32, bfloat16 or float16, or None'

  def check_model(self, model):
    """Raises IncompatibleError for a model, of arrays or shapes, that no family says."""
    from efficient_lm.interop import write
    write.written(model)

  def write(self, model, tokenizer, out: str, length: int = 2048) -> tuple[str, ...]:
    """As HuggingFaceFolder.write. Raises IncompatibleError where a weight has a format that the library lacks, or where
    weights have several."""
    from efficient_lm.interop import write
    written = write.written(model, length, self.dtype)
    schemes, plain = _schemes(written)
    # The head is named also where it is the embedding: transformers has a Linear for it, and would look for its scale.
    config = {**written.config, 'quantization_config': _only(schemes).config(sorted({*plain, 'lm_head'}))}
    save(config, self._tensors(written, schemes), tokenizer, out)
    notes = dict.fromkeys(note for scheme in schemes.values() for note in scheme.notes)
    return (*written.notes, *files(tokenizer, out), *notes, *_outside(written))

  def _tensors(self, written, schemes):
    for name, one in written.tensors.items():
      module = name.removesuffix('.weight')
      if module in schemes:
        for kind, array in schemes[module].tensors(one).items(): yield f'{module}.{kind}', array
      else: yield name, one.dequantized() if hasattr(one, 'dequantized') else one

  def read(self, out: str, tokens_BT, hooks=None):
    """Logits (B, T, V) float32 by transformers from the dequantized weights. `hooks`: see transformers_logits. Raises
    ImportError where it, or the library compressed-tensors, is not installed."""
    import compressed_tensors  # noqa: F401
    from transformers import CompressedTensorsConfig
    return transformers_logits(out, tokens_BT, hooks, quantization_config=CompressedTensorsConfig(dequantize=True))


@dataclasses.dataclass(frozen=True)
class Scheme:
  """How a matrix is stored. group: inputs that share a scale, None: all of a row."""
  bits: int
  kind: str   # 'int', 'float'
  group: int | None
  activations: int | None   # bits that tokens are rounded to, each by a scale of its own

  @property
  def format(self) -> str:
    return 'pack-quantized' if self.bits == 4 else 'float-quantized' if self.kind == 'float' else 'int-quantized'

  @property
  def notes(self) -> tuple[str, ...]:
    if self.activations is None or self.kind != 'int': return ()
    return ('Tokens are rounded here by their largest magnitude over 127, in compressed-tensors over 127.5: products differ '
            'by that, weights do not.',)

  def config(self, plain: list[str]) -> dict[str, Any]:
    """`quantization_config`; `plain`: modules that are left in floats."""
    weights = dict(num_bits=self.bits, type=self.kind, symmetric=True, dynamic=False, group_size=self.group,
                   strategy='channel' if self.group is None else 'group')
    tokens = None if self.activations is None else dict(num_bits=self.activations, type=self.kind, symmetric=True,
                                                        strategy='token', dynamic=True)
    return dict(quant_method='compressed-tensors', format=self.format, quantization_status='compressed', ignore=plain,
                config_groups={'group_0': dict(targets=['Linear'], weights=weights, input_activations=tokens)})

  def tensors(self, one) -> dict[str, Any]:
    """What stands for a matrix, by the end of its name."""
    import ml_dtypes
    import numpy as np
    if self.bits == 4:
      nibbles_OI = (one.numbers_OI + 8).astype(np.uint8)   # 8 to a word, the first in its lowest bits
      packed = np.ascontiguousarray(nibbles_OI[:, ::2] | nibbles_OI[:, 1::2] << 4).view('<i4')
      return {'weight_packed': packed, 'weight_scale': one.step_OQ, 'weight_shape': np.array(one.shape, np.int64)}
    codes = one.numbers_OI if self.kind == 'int' else one.numbers_OI.astype(ml_dtypes.float8_e4m3fn)
    return {'weight': codes, 'weight_scale': one.step_OQ}


def _schemes(written) -> tuple[dict[str, Scheme], set[str]]:
  """The scheme of every matrix in few bits, by its module, and the modules of those in floats."""
  schemes, plain = {}, set()
  for name, one in written.tensors.items():
    module = name.removesuffix('.weight')
    if module == name or len(one.shape) != 2 or module.endswith(OUTSIDE[1:]): continue
    if not hasattr(one, 'dequantized') or module.endswith(OUTSIDE): plain.add(module)
    else: schemes[module] = _scheme(name, one)
  for module in sorted(schemes):
    root, _, own = module.rpartition('.')
    joined = next((names for names in FUSED if own in names), ())
    others = [f'{root}.{name}' for name in joined if f'{root}.{name}' in plain or f'{root}.{name}' in schemes]
    odd = next((name for name in others if schemes.get(name) != schemes[module]), None)
    if odd:
      raise IncompatibleError(f'{module} and {odd} have different formats: engines join them into one matrix, which has one')
  if not schemes:
    raise IncompatibleError('no matrix of the layers is in few bits, or none lies in files of its family as it does here: '
                            'export it as --format=hf')
  return schemes, plain


def _scheme(name: str, one) -> Scheme:
  from efficient_lm.formats import Channel, Float8, FullRangeInt, Group, Int
  format, tokens = one.format, one.activations
  kind = 'float' if type(format) is Float8 else 'int'
  fits = type(format) in (Int, FullRangeInt, Float8) and isinstance(format.scales, (Channel, Group)) and one.zero_OQ is None
  if not fits or format.bits not in (8, 4) or format.element == 'float8_e5m2':
    raise IncompatibleError(f'{name} is in {format.name}, which no scheme of compressed-tensors says: symmetric integers of '
                            f'8 or 4 bits and float8 e4m3, per channel or group, are')
  if format.bits == 4 and one.shape[1] % 8:
    raise IncompatibleError(f'{name} has {one.shape[1]} inputs: 4-bit codes lie 8 to a word')
  if tokens is not None and (tokens.bits != 8 or type(tokens) is not type(format) or not tokens.symmetric):
    raise IncompatibleError(f'{name}: its tokens are rounded to {tokens.name}, which compressed-tensors does not beside '
                            f'{format.name}')
  group = one.shape[1] // one.step_OQ.shape[1] if isinstance(format.scales, Group) else None
  return Scheme(format.bits, kind, group, None if tokens is None else tokens.bits)


def _only(schemes: dict[str, Scheme]) -> Scheme:
  first, *rest = schemes
  other = next((module for module in rest if schemes[module] != schemes[first]), None)
  if other is None: return schemes[first]
  one, two = (f'{scheme.format} in groups of {scheme.group}' for scheme in (schemes[first], schemes[other]))
  raise IncompatibleError(f'{first} and {other} are in different formats ({one}, {two}), and a folder has '
                          f'one: choose groups that divide the inputs of both')


def _outside(written) -> tuple[str, ...]:
  """What is in few bits here and not there."""
  bits = [name for name, one in written.tensors.items()
          if hasattr(one, 'dequantized') and re.sub(r'\.weight$', '', name).endswith(OUTSIDE)]
  return (f'{" and ".join(bits)}, in few bits here, are written as the floats that they stand for.',) if bits else ()
