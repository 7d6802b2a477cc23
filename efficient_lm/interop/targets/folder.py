"""A folder as Hugging Face's hub has it, of floats: what transformers, vLLM and all their kin open."""
import dataclasses
import os
from collections.abc import Iterator, Mapping

from efficient_lm.interop.folder import CONFIG, INDEX, WEIGHTS

SHARD = 4 << 30   # bytes of a file: what is held in memory at once


@dataclasses.dataclass(kw_only=True)
class HuggingFaceFolder:
  """config.json, safetensors, tokenizer.json. `dtype` of what is written: float32, bfloat16 or float16; None: as the model
  holds it. What is in few bits is written as the floats that it stands for."""
  dtype: str | None = None

  title = 'Hugging Face folder'
  independent = 'transformers'   # what opens it, beside this project

  def check(self):
    if self.dtype not in (None, 'float32', 'bfloat16', 'float16'):
      yield 'dtype', self.dtype, 'must be float32, bfloat16 or float16, or None'

  def check_model(self, model):
    """Raises IncompatibleError for a model, of arrays or shapes, that no family says."""
    from efficient_lm.interop import write
    write.written(model)

  def write(self, model, tokenizer, out: str, length: int = 2048) -> tuple[str, ...]:
    """Writes the files into the folder `out`; `length`: tokens of a text that the model is made for. Returns notes. Raises
    IncompatibleError for a model that no family says."""
    from efficient_lm.interop import write
    from efficient_lm.interop.written import Stored
    written = write.written(model, length, self.dtype)
    if self.dtype is not None: written = dataclasses.replace(written, config={**written.config, 'dtype': self.dtype,
                                                                              'torch_dtype': self.dtype})
    bits = []

    def floats():
      for name, one in written.tensors.items():
        if isinstance(one, Stored):
          bits.append(one)
          one = one.dequantized() if self.dtype is None else one.dequantized().astype(self.dtype)
        yield name, one
    save(written.config, floats(), tokenizer, out)
    said = files(tokenizer, out)
    return (*written.notes, *said, *_dequantized(bits, self.dtype))

  def read(self, out: str, tokens_BT):
    """Logits (B, T, V) float32 by transformers. Raises ImportError where that is not installed."""
    return transformers_logits(out, tokens_BT)


def _dequantized(bits, dtype) -> Iterator[str]:
  if not bits: return
  formats, rounded = ', '.join(sorted({one.format.name for one in bits})), dtype not in (None, 'float32')
  yield (f'{len(bits)} matrices in few bits ({formats}) are written as the floats that they stand for'
         f'{f", rounded to {dtype}" if rounded else ""}.')
  if any(one.activations is not None for one in bits):
    yield 'Activations, which the model rounds, are not rounded elsewhere.'


def save(config: Mapping, tensors, tokenizer, out: str):
  """config.json and safetensors of (name, array) pairs, in files of SHARD bytes, each written when it is full."""
  from efficient_lm.interop import safetensors, tokenizer_files
  tokenizer_files.dump({**config, **tokenizer_files.marks_of(tokenizer)}, os.path.join(out, CONFIG))
  shards, pending, size = [], {}, 0
  for name, array in tensors:
    if pending and size + array.nbytes > SHARD:
      shards.append(list(pending))
      safetensors.write(os.path.join(out, f'{len(shards)}.part'), pending)
      pending, size = {}, 0
    pending[name], size = array, size + array.nbytes
  if not shards: return safetensors.write(os.path.join(out, WEIGHTS), pending)
  shards.append(list(pending))
  safetensors.write(os.path.join(out, f'{len(shards)}.part'), pending)
  names = [f'model-{i + 1:05}-of-{len(shards):05}.safetensors' for i in range(len(shards))]
  for i, name in enumerate(names): os.rename(os.path.join(out, f'{i + 1}.part'), os.path.join(out, name))
  places = {tensor: name for name, shard in zip(names, shards) for tensor in shard}
  total = sum(os.path.getsize(os.path.join(out, name)) for name in names)
  tokenizer_files.dump({'metadata': {'total_size': total}, 'weight_map': places}, os.path.join(out, INDEX))


def files(tokenizer, out: str) -> tuple[str, ...]:
  """What stands beside the weights: the tokenizer, and how text is generated."""
  from efficient_lm.interop import tokenizer_files
  tokenizer_files.dump({'_from_model_config': True, **tokenizer_files.marks_of(tokenizer)},
                       os.path.join(out, 'generation_config.json'))
  return tokenizer_files.write(tokenizer, out)


def transformers_logits(out: str, tokens_BT, hooks=None, **options):
  """Logits (B, T, V) float32 that transformers computes from a folder, with no network. `hooks`: what to do before a module
  is called, by the module's name."""
  import numpy as np
  import torch
  import transformers
  transformers.utils.logging.disable_progress_bar()
  with torch.no_grad():
    model = transformers.AutoModelForCausalLM.from_pretrained(
      out, dtype=torch.float32, local_files_only=True, attn_implementation='eager', **options)
    for name, hook in (hooks or {}).items(): model.get_submodule(name).register_forward_pre_hook(hook)
    return model(torch.from_numpy(np.asarray(tokens_BT, np.int64))).logits.float().numpy()
