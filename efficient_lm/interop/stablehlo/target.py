"""StableHLO as an export target: a folder that a process with jax alone, or any other reader of StableHLO, runs.

  prefill.stablehlo, decode.stablehlo   `jax.export` of the two programs of `programs`: one for all platforms, any number of
                                        sequences, prompts of any length up to `length`
  weights.safetensors                   the arrays of the model as they are stored, by their paths
  manifest.json                         names, shapes and dtypes of arguments and results, in their order; vocabulary; marks
  tokenizer.json                        as this package stores it, or, where it is one of the library `tokenizers`, its own
  run.py                                an example that needs jax, numpy and flatbuffers only (with which jax reads programs)

The programs are read by `jax.export.deserialize`; a jax up to half a year newer than the one that wrote them must read them
(docs.jax.dev, "Exporting and serializing staged-out computations"). What they hold inside is a portable StableHLO artifact.
"""
import dataclasses
import importlib.util
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
from typing import Any

import numpy as np

from efficient_lm.errors import ConfigError, at_least
from efficient_lm.models.spec import FloatCache

PLATFORMS = ('cpu', 'cuda', 'rocm', 'tpu')
WEIGHTS, MANIFEST, TOKENIZER, EXAMPLE = 'weights.safetensors', 'manifest.json', 'tokenizer.json', 'run.py'

STEPS = """
import sys
import numpy as np
out, asked, answered = sys.argv[1:]
sys.path.insert(0, out)
import run
tokens_BT, model = np.load(asked), run.Model(out)
B, T = tokens_BT.shape
logits_BV, cache = model.prefill(tokens_BT[:, :1], np.ones(B))
found = [np.asarray(logits_BV)]
for t in range(1, T):
  logits_BV, cache = model.decode(tokens_BT[:, t], np.full(B, t), cache)
  found.append(np.asarray(logits_BV))
assert 'efficient_lm' not in sys.modules
np.save(answered, np.stack(found, 1))
"""


@dataclasses.dataclass(kw_only=True)
class StableHlo:
  """length: tokens of a sequence at most, the prompt's included: slots of its cache; None: as many as the model is made for.
  cache: the format of that. platforms: for which the programs are made."""
  length: int | None = None
  cache: Any = FloatCache()
  platforms: tuple[str, ...] = ('cpu', 'cuda', 'tpu')

  title = 'StableHLO'
  independent = 'jax in a process without this project'

  def check(self):
    if self.length is not None: yield from at_least(self, length=1)
    yield from check_cache(self.cache)
    if not self.platforms or not set(self.platforms) <= set(PLATFORMS):
      yield 'platforms', self.platforms, f'must hold some of {", ".join(PLATFORMS)}'

  def write(self, model, tokenizer, out: str, length: int = 2048) -> tuple[str, ...]:
    """Writes the files named above into the empty folder `out`; notes for the page of the export. `length`: that of the
    model, for a target that names none. Raises ConfigError without the package flatbuffers, IncompatibleError for what the
    model cannot do: read `length` tokens, or decode at all."""
    need_flatbuffers()
    length = self.length or length
    import jax
    import jax.export

    from efficient_lm.interop.stablehlo import programs, weights
    sizes = lambda batch: programs.Sizes(batch, length, tokenizer.vocab_size, self.cache)
    batch, tokens = jax.export.symbolic_shape('batch, tokens', constraints=[f'tokens <= {length}'])
    made = {'prefill': programs.prefill(model, sizes(batch), tokens),
            'decode': programs.decode_step(model, sizes(*jax.export.symbolic_shape('batch')))}
    described = {}
    for name, program in made.items():
      exported = program.export(self.platforms)
      file = f'{name}.stablehlo'
      pathlib.Path(out, file).write_bytes(exported.serialize())
      described[name] = program_entry(program, exported, file)
    named = programs.weights_of(model)
    stored = weights.write(os.path.join(out, WEIGHTS), named)
    manifest = {
      'format': 'efficient_lm StableHLO 1', 'jax': jax.__version__, 'platforms': self.platforms, 'length': length,
      'vocab_size': tokenizer.vocab_size, 'bos': tokenizer.bos, 'stops': tokenizer.stops, 'weights_file': WEIGHTS,
      'weights': [array_entry(name, array) | {'stored': kind} for (name, array), kind in zip(named, stored)],
      'programs': described}
    pathlib.Path(out, MANIFEST).write_text(json.dumps(manifest, indent=1))
    write_tokenizer(tokenizer, out)
    shutil.copyfile(pathlib.Path(__file__).with_name(EXAMPLE), os.path.join(out, EXAMPLE))
    return self._notes(jax.__version__, length)

  def read(self, out: str, tokens_BT):
    """Logits (B, T, V) float32 by the example's own `Model`, token by token."""
    with tempfile.TemporaryDirectory() as folder:
      asked, answered = (os.path.join(folder, name) for name in ('asked.npy', 'answered.npy'))
      np.save(asked, np.asarray(tokens_BT, np.int32))
      subprocess.run([sys.executable, '-IB', '-c', STEPS, out, asked, answered], check=True, capture_output=True)
      return np.load(answered)

  def _notes(self, version: str, length: int) -> tuple[str, ...]:
    return (
      f'The programs take any number of sequences and prompts of 1 to {length} tokens, on {", ".join(self.platforms)}.',
      f'They were written by jax {version}; `python {EXAMPLE} 1,2,3` runs them with jax, numpy and flatbuffers alone.',
      'Every operation is plain XLA: no kernel of this package for one kind of device is in them.')


def need_flatbuffers():
  """Raises ConfigError without the package: jax serializes by it and does not bring it."""
  if importlib.util.find_spec('flatbuffers') is None:
    raise ConfigError('format', 'stablehlo', 'needs the package flatbuffers: pip install "efficient_lm[stablehlo]"')


def array_entry(name: str, array) -> dict:
  """Name, shape and dtype for the manifest; a dimension that is known only when a program runs is a text."""
  return {'name': name, 'shape': [size if isinstance(size, int) else str(size) for size in array.shape],
          'dtype': array.dtype.name}


def program_entry(program, exported, file: str) -> dict:
  """A program for the manifest: what it takes after the weights, and what it gives."""
  results = [array_entry(name, shape) for name, shape in zip(program.results, exported.out_avals, strict=True)]
  return {'file': file, 'arguments': [array_entry(*argument) for argument in program.arguments], 'results': results}


def check_cache(cache):
  """Yields the problem of a cache whose tokens share scales: it is filled up by whole groups, which sequences of several
  lengths do not have (`models.decode.stream`)."""
  if getattr(cache, 'group', 1) > 1: yield 'cache', cache, 'needs group=1, for sequences of several lengths'


def write_tokenizer(tokenizer, out: str):
  """tokenizer.json in the words of the library `tokenizers`, for one that is made of it; else in those of this package."""
  pathlib.Path(out, TOKENIZER).write_text(getattr(tokenizer, 'model', None) or tokenizer.to_json())
