"""Writes a model as one GGUF file, its matrices in few bits as blocks of the very same numbers."""
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence

import numpy as np

from efficient_lm.errors import ConfigError
from efficient_lm.interop.gguf import binary, blocks, metadata, packing, tensors, tokens
from efficient_lm.interop.gguf.config import ARCHITECTURES
from efficient_lm.interop.written import Stored, Written

FILE = 'model.gguf'
FLOATS = {'float32': 'F32', 'float16': 'F16', 'bfloat16': 'BF16'}
OTHERS = ('refuse', 'floats')
BITS = {'float16': 11, 'bfloat16': 8}   # of a significand


@dataclasses.dataclass(kw_only=True)
class GgufFile:
  """A file for llama.cpp and what is built on it. `floats`: of matrices that are not in few bits; norms, biases and routers
  are float32 always. `ternary`: the blocks of ternary matrices, 'TQ2_0' (2.06 bits a number) or 'TQ1_0' (1.69). `others`:
  what becomes of matrices in formats that GGUF has no block for, 'refuse' or 'floats'. `tokenizer`: whether the file has
  one; without it, prompts are ids."""
  floats: str = 'float32'
  ternary: str = 'TQ2_0'
  others: str = 'refuse'
  tokenizer: bool = True

  title = 'GGUF file'
  independent = 'llama.cpp'

  def check(self):
    for field, choices in (('floats', tuple(FLOATS)), ('ternary', packing.TERNARY), ('others', OTHERS)):
      value = getattr(self, field)
      if value not in choices: yield field, value, f'must be one of {", ".join(map(repr, choices))}'

  def check_model(self, model):
    """Raises IncompatibleError for a model, of arrays or shapes, that no family says, ConfigError for one that
    GGUF does not."""
    from efficient_lm.interop import write
    metadata.metadata(write.written(model).config)

  def write(self, model, tokenizer, out: str, length: int = 2048) -> tuple[str, ...]:
    """Writes model.gguf into the folder `out`; `length`: tokens of a text that the model is made for. Returns notes. Raises
    IncompatibleError for a model that no family says, ConfigError for what GGUF cannot say."""
    from efficient_lm.interop import write
    written = write.written(model, length)
    return (*written.notes, *self.save(written, tokenizer, os.path.join(out, FILE)))

  def read(self, out: str, tokens_BT):
    """Logits (B, T, V) float32 by llama.cpp, its cache in float32. Raises ImportError where llama-cpp-python is not
    installed."""
    import llama_cpp  # noqa: F401
    path = os.path.join(out, FILE)
    return np.stack([asked_of_llama_cpp(path, np.asarray(ids_T).tolist())['logits'] for ids_T in tokens_BT])

  def save(self, written: Written, tokenizer, path: str) -> tuple[str, ...]:
    """Writes `path`, all or nothing. tokenizer: one of data.tokenizers, or None. Returns what is not as it was in the model,
    in sentences. Raises ConfigError for what GGUF cannot say, before anything is written."""
    config, path = written.config, os.fspath(path)
    keys = metadata.metadata(config)
    name = keys['general.architecture']
    found = {one.name: one for one in tensors.named(written.tensors, config, ARCHITECTURES[name])}
    if (divisors := metadata.frequencies(config)) is not None:
      found[metadata.FREQUENCIES] = tensors.Named(metadata.FREQUENCIES, 'rope_freqs', (divisors,))
    metadata.check(path, config, keys, {name: one.shape for name, one in found.items()})
    if not self.tokenizer: tokenizer = None
    keys |= tokens.NONE if tokenizer is None else tokens.metadata(tokenizer, keys[f'{name}.vocab_size'], name)
    notes: dict[str, float] = {}
    lines = {name: self._line(one, notes) for name, one in found.items()}
    if any(line.kind in blocks.RECORDS for line in lines.values()): keys['general.quantization_version'] = 2
    binary.write(path, keys, lines)
    return (*(sentence.format(size=size) for sentence, size in notes.items()), *_activations(written.tensors),
            *tokens.notes(tokenizer))

  def _line(self, one: tensors.Named, notes: dict[str, float]) -> binary.Line:
    """notes: sentences with the greatest size that stands in them."""
    kinds = {self._kind(one, part) for part in one.parts}
    if len(kinds) > 1:
      raise ConfigError(one.name, sorted(kinds), 'experts of one layer lie in one tensor, and must be in one format')
    kind = kinds.pop()
    if kind in blocks.RECORDS:
      for part in one.parts: _note(notes, _moved(one.name, part, kind), kind)
      return binary.Line(one.shape, kind, lambda: np.stack([packing.pack(part, kind) for part in one.parts]))
    floats = lambda part: part.dequantized() if isinstance(part, Stored) else part   # made when they are needed
    if kind != 'F32': self._check_rounding(one.name, map(floats, one.parts), notes)
    return binary.Line(one.shape, kind, lambda: np.stack([floats(part).astype(blocks.PLAIN[kind]) for part in one.parts]))

  def _kind(self, one: tensors.Named, part: tensors.Array) -> str:
    plain = 'F32' if one.plain else FLOATS[self.floats]
    if not isinstance(part, Stored): return plain
    if kind := packing.kind_of(part, self.ternary): return kind
    if self.others == 'floats': return plain
    raise ConfigError(one.name, part.format.name, f"{packing.fix(part)}; or GgufFile(others='floats')")

  def _check_rounding(self, name: str, parts, notes: dict[str, float]):
    """Notes floats that 16 bits round. Raises ConfigError for those that they cannot hold."""
    dtype = blocks.PLAIN[FLOATS[self.floats]]
    for part in parts:
      with np.errstate(over='ignore'): kept = part.astype(dtype)
      if not np.isfinite(kept.astype(np.float32)).all():
        raise ConfigError('floats', self.floats, f"{name} has numbers that it cannot hold: choose 'bfloat16' or 'float32'")
      if part.dtype != dtype and (kept.astype(np.float32) != part.astype(np.float32)).any():
        notes[f'Floats are rounded to {self.floats}, by at most 2^-{BITS[self.floats]} of their size (normal numbers).'] = 0


def asked_of_llama_cpp(path: str, ids: list[int], texts: Sequence[str] = ()) -> dict[str, np.ndarray]:
  """What `engine.py` answers for a file, in a process of its own. Raises RuntimeError with the engine's last words."""
  with tempfile.TemporaryDirectory() as folder:
    asked, answered = (os.path.join(folder, name) for name in ('asked.json', 'answered.npz'))
    with open(asked, 'w', encoding='utf-8') as file: json.dump({'ids': ids, 'texts': list(texts)}, file)
    program = os.path.join(os.path.dirname(__file__), 'engine.py')
    done = subprocess.run([sys.executable, program, path, asked, answered], capture_output=True, text=True, check=False)
    if done.returncode: raise RuntimeError(done.stderr[-2000:].strip().rpartition('\n')[2])
    return dict(np.load(answered))


def _moved(name: str, part: Stored, kind: str) -> float:
  try: return packing.moved(part, kind)
  except ValueError as error:
    fix = f"{error}, and blocks of {kind} have: fit scales by a format with scale_dtype='float16'"
    raise ConfigError(name, part.format.name, fix) from error


def _note(notes: dict[str, float], size: float, kind: str):
  if not size: return
  what = 'of a step' if kind == 'Q4_1' else 'of their size'
  exact = '' if kind == 'Q4_1' else " A format with scale_dtype='float16' is exact."
  sentence = (f'Scales of matrices in {kind} are rounded to float16: codes are as they were, numbers have moved by up to '
              f'{{size:.1e}} {what}.{exact}')
  notes[sentence] = max(size, notes.get(sentence, 0.0))


def _activations(found: Mapping[str, tensors.Array]) -> list[str]:
  """Engines round what blocks are multiplied with in their own way, whatever the model does."""
  rounded = {part.activations.name for part in found.values() if isinstance(part, Stored) and part.activations}
  return [f'The model rounds activations to {name}: an engine rounds them to its own blocks of 8 bits instead.'
          for name in sorted(rounded)]
