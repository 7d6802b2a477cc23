"""Reading a checkpoint of Hugging Face into a model, against `safetensors.torch`, which reads the same file into tensors."""
import importlib.util
import os
import tempfile

import jax

from efficient_lm.benches.few_bits import smol
from efficient_lm.benches.result import OURS, Case
from efficient_lm.data.tokenizers import ByteTokenizer
from efficient_lm.interop import folder, write
from efficient_lm.interop.huggingface import HuggingFace
from efficient_lm.interop.targets.folder import save
from efficient_lm.training.learner import new_model


def importing(quick: bool, target: float | None = None) -> Case:
  """The whole of a checkpoint, in the page cache of the system. Tensors of the baseline are cloned: it maps the file, as we
  do, and would read nothing before a tensor is used."""
  out = tempfile.TemporaryDirectory()   # lives as long as OURS, which holds it
  written = write.written(new_model(smol(quick), jax.random.key(0)), 1024, None)
  save(written.config, written.tensors.items(), ByteTokenizer(), out.name)
  file = os.path.join(out.name, folder.WEIGHTS)
  candidates = {OURS: lambda: jax.block_until_ready(jax.tree.leaves(HuggingFace(path=out.name).load()))}
  if importlib.util.find_spec('torch'):
    from safetensors.torch import load_file
    candidates['safetensors.torch'] = lambda: {name: tensor.clone() for name, tensor in load_file(file).items()}
  size = os.path.getsize(file)
  return Case(candidates=candidates, bytes=size, target=target, agreement=f'a file of {size / 1e6:.0f} MB')
