"""LiteRT (once TensorFlow Lite) as an export target: one file for the interpreter of phones, made of the same StableHLO.

  model.tflite    the signatures `prefill` and `decode` of `stablehlo.programs`, which share the weights: constants of it
  manifest.json   names, shapes and dtypes of what both take and give; vocabulary; marks
  tokenizer.json  as with StableHLO

LiteRT has no sizes that vary: sequences and tokens of a prompt are numbers of the target, and a shorter prompt is filled up.
Its converter writes no loops and no sorts, so that layers stand one after another, and mixtures of experts are refused. It
shifts no bytes either: weights of fewer than eight bits take a byte a number, and those that are no integers are
dequantized.
The converter's Python interface is not documented by its makers: its version is pinned.
"""
import dataclasses
import importlib.util
import json
import pathlib
from typing import Any

from efficient_lm.errors import ConfigError, IncompatibleError, at_least
from efficient_lm.interop.stablehlo.target import MANIFEST, array_entry, check_cache, write_tokenizer
from efficient_lm.models.spec import FloatCache

FILE = 'model.tflite'
LARGEST = 2 ** 31   # bytes of a flatbuffer


@dataclasses.dataclass(kw_only=True)
class LiteRT:
  """batch: sequences at a time. prompt: tokens of the longest prompt. length, cache: as in StableHlo."""
  batch: int = 1
  prompt: int = 128
  length: int = 512
  cache: Any = FloatCache()

  title = 'LiteRT file'
  independent = 'the interpreter of LiteRT'

  def check(self):
    yield from at_least(self, batch=1, prompt=1, length=1)
    if self.prompt > self.length: yield 'prompt', self.prompt, f'must be at most the length, {self.length}'
    yield from check_cache(self.cache)
    if getattr(self.cache, 'bits', 8) < 8: yield 'cache', self.cache, 'LiteRT shifts no bytes: use FloatCache or 8 bits'

  def write(self, model, tokenizer, out: str, length: int = 2048) -> tuple[str, ...]:
    """Writes the files named above into the empty folder `out`; notes for the page of the export. `length`, of texts that
    the model is made for, is not that of the file's cache. Raises ConfigError without the converter, IncompatibleError for
    what LiteRT cannot say."""
    if importlib.util.find_spec('litert_converter') is None:
      raise ConfigError('format', 'litert', 'needs the package litert-converter: pip install "efficient_lm[litert]"')
    from efficient_lm.interop.stablehlo import programs
    model, notes = plain(model)
    sizes = programs.Sizes(self.batch, self.length, tokenizer.vocab_size, self.cache)
    made = {'prefill': programs.prefill(model, sizes, self.prompt), 'decode': programs.decode_step(model, sizes)}
    exported = {name: fixed(program, model).export(('cpu',)) for name, program in made.items()}
    names = {name: ([argument_name(a) for a, _ in program.arguments], [argument_name(r) for r in program.results])
             for name, program in made.items()}
    pathlib.Path(out, FILE).write_bytes(converted({name: one.mlir_module() for name, one in exported.items()}, names))
    manifest = {'format': 'efficient_lm LiteRT 1', 'length': self.length, 'prompt': self.prompt, 'batch': self.batch,
                'vocab_size': tokenizer.vocab_size, 'bos': tokenizer.bos, 'stops': tokenizer.stops, 'signatures': {
                  name: {'arguments': [array_entry(*pair) for pair in zip(names[name][0], one.in_avals, strict=True)],
                         'results': [array_entry(*pair) for pair in zip(names[name][1], one.out_avals, strict=True)]}
                  for name, one in exported.items()}}
    pathlib.Path(out, MANIFEST).write_text(json.dumps(manifest, indent=1))
    write_tokenizer(tokenizer, out)
    return (f'The file takes {self.batch} sequences at a time, prompts of at most {self.prompt} tokens, filled up on the '
            f'right to that, and {self.length} tokens in all.', *notes)

  def read(self, out: str, tokens_BT):
    """Logits (B, T, V) float32 by the interpreter, token by token. Raises ImportError where it is not installed."""
    import numpy as np
    from ai_edge_litert.interpreter import Interpreter
    interpreter = Interpreter(model_path=str(pathlib.Path(out, FILE)))
    prefill, decode = (interpreter.get_signature_runner(name) for name in ('prefill', 'decode'))
    slots = [name for name in decode.get_input_details() if name not in ('tokens', 'starts')]
    tokens_BT = np.asarray(tokens_BT[:, :self.length], np.int32)
    prompt_BT = np.zeros((self.batch, self.prompt), np.int32)
    prompt_BT[:len(tokens_BT), :1] = tokens_BT[:, :1]
    found = prefill(tokens=prompt_BT, lengths=np.ones(self.batch, np.int32))
    logits = [found['logits']]
    for t in range(1, tokens_BT.shape[1]):
      tokens_B = np.resize(tokens_BT[:, t], self.batch)
      found = decode(tokens=tokens_B, starts=np.full(self.batch, t, np.int32), **{slot: found[slot] for slot in slots})
      logits.append(found['logits'])
    return np.stack(logits, 1)[:len(tokens_BT)]


def argument_name(name: str) -> str:
  """As signatures spell it."""
  return name.replace('/', '.')


def plain(model):
  """The model as LiteRT can say it, of the same values, and notes on what that changed. Raises IncompatibleError."""
  from efficient_lm.models.moe.layer import MoE
  from efficient_lm.models.transformer import Repeated, Stack, unrolled
  from efficient_lm.tree import num_bytes, rewrite, select
  from efficient_lm.weights.quantized import Quantized
  if any(select(model, MoE)): raise IncompatibleError('a mixture of experts: LiteRT has no sort and no loop; use stablehlo')
  if any(select(model, (Stack, Repeated))): model = unrolled(model)
  changed = {}
  def visit(path, weight):
    made = in_bytes(weight)
    if made is not weight: changed[path] = f'{weight.kind} as {made.kind}'
    return made
  if any(select(model, Quantized)): model = rewrite(model, Quantized, visit)
  if num_bytes(model) >= LARGEST:
    raise IncompatibleError(f'weights of {num_bytes(model):,} bytes: a LiteRT file holds less than {LARGEST:,}')
  kinds = sorted(set(changed.values()))
  return model, tuple(f'{[*changed.values()].count(kind)} weights are stored {kind}, of the same values.' for kind in kinds)


def in_bytes(weight):
  """A `Quantized` weight without codes that share bytes. Raises IncompatibleError for one that rounds its inputs to what
  LiteRT does not have."""
  from efficient_lm.formats import Encoded, FullRangeInt, Int
  from efficient_lm.ops import packing
  from efficient_lm.weights.quantized import Quantized
  from efficient_lm.weights.weight import Dense
  format, rounding = weight.format, weight.activations
  if isinstance(format, (Int, FullRangeInt)):
    if format.bits == 8: return weight
    encoded = Encoded(packing.unpack(weight.encoded.values, format.bits), weight.encoded.scales)
    wide = dataclasses.replace(format, bits=8)
    return Quantized(encoded, wide, weight.layout, rounding, weight.keeps_zeros)
  if rounding is not None: raise IncompatibleError(f'products of {format.name} that round their inputs: use stablehlo')
  return Dense(weight.materialize(), weight.axes, weight.inputs)


def fixed(program, model):
  """The program with the weights of the model as constants. Integers are behind a barrier: the converter would compute the
  floats that they stand for, and store those."""
  import jax
  import jax.numpy as jnp

  from efficient_lm.interop.stablehlo import programs
  weights = [array for _, array in programs.weights_of(model)]
  def run(*arrays):
    kept = [jax.lax.optimization_barrier(one) if jnp.issubdtype(one.dtype, jnp.integer) else one for one in weights]
    return program.run(*kept, *arrays)
  return dataclasses.replace(program, run=run, weights=())


def converted(texts: dict[str, str], names: dict) -> bytes:
  """The flatbuffer of modules of StableHLO, each a signature, with the names of its arguments and results. Raises
  IncompatibleError for what the converter cannot turn into operations of LiteRT."""
  from litert_converter import converter_api_ext as converter
  from litert_converter.mlir import ir, passmanager
  context = ir.Context()
  converter.prepare_mlir_context(context)
  with context:
    try:
      modules = []
      for signature, text in texts.items():
        modules.append(ir.Module.parse(text))
        # The signature takes a name that a function inside may have.
        passmanager.PassManager.parse('builtin.module(inline)').run(modules[-1].operation)
        converter.set_signature(modules[-1].operation, signature, *names[signature])
        converter.run_convert_to_tfl_passes(modules[-1], passmanager.PassManager(), converter.ConvertToTFLConfig())
      return converter.export_flatbuffer_to_bytes(converter.merge_modules(modules).operation)
    except (ValueError, ir.MLIRError) as error:
      reason = ' '.join(str(error).split())[:300]
      raise IncompatibleError(f'LiteRT cannot say this model: {reason}') from error
