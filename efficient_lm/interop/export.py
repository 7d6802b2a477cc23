"""Models on their way out, as a stage of a run:

  stages=(Train(…), Quantize(…), Export(to=GgufFile()))

and as the function behind `python -m efficient_lm.export`. What an export writes appears as a whole or not at all.
"""
import dataclasses
import os
import shutil
from typing import Any

import numpy as np

from efficient_lm.errors import ConfigError, IncompatibleError
from efficient_lm.interop.targets import HuggingFaceFolder

TOKENS = 256   # of text that engines are compared on


@dataclasses.dataclass(kw_only=True)
class Export:
  """Writes the model for another engine into the folder `path` (None: 'export' in the stage's own folder), and leaves it as
  it is. `to`: one of `interop.targets`."""
  to: Any = dataclasses.field(default_factory=HuggingFaceFolder)
  path: str | None = None

  def check(self):
    if not hasattr(self.to, 'write'): yield 'to', self.to, 'must be one of efficient_lm.interop.targets'
    if self.path == '': yield 'path', self.path, 'must name a folder, or be None'

  def __call__(self, model, context):
    """The model, and where it was written. Raises IncompatibleError for a model that the format cannot say."""
    import jax
    if jax.process_count() > 1:
      raise IncompatibleError('a model on several hosts is not written by one of them: use python -m efficient_lm.export')
    out, corpus = self.path or str(context.outputs / 'export'), context.corpus
    length = context.sequence_length
    ids = corpus.tokenizer.prompt(corpus.eval_documents()[0].content[:16 * TOKENS])[:min(TOKENS, length)]
    notes = export(self.to, model, corpus.tokenizer, out, source=str(context.outputs), length=length, replace=True,
                   tokens_BT=np.asarray(ids)[None], text='held-out text')
    return model, (f'Export: {self.to.title} in {out}', *notes)

  def abstract(self, model):
    """The model as it is. Raises IncompatibleError, before anything is trained, for one that the format cannot say."""
    if hasattr(self.to, 'check_model'): self.to.check_model(model)
    return model


def export(target, model, tokenizer, out: str, *, source: str, length: int, tokens_BT, text: str, replace: bool = False):
  """Writes `model` for the target's engine into the folder `out`, compares the two on `tokens_BT` of `text` where the engine
  is installed, and returns notes. `source`: what the model is called. Raises ConfigError where `out` is taken, unless it is
  to be replaced, IncompatibleError for a model that the format cannot say."""
  from efficient_lm.interop import parity
  if os.path.exists(out) and not replace: raise ConfigError('--out', out, 'is there already: name another folder')
  out = os.path.abspath(out)
  part = f'{out}.part'
  try:
    shutil.rmtree(part, ignore_errors=True)
    os.makedirs(part)
  except (OSError, ValueError) as error:   # ValueError: of a name with a NUL
    raise ConfigError('--out', out, f'cannot be made: {getattr(error, "strerror", None) or error}') from error
  try:
    notes = target.write(model, tokenizer, part, length)
    figures, why = parity.measured(target, model, part, tokens_BT)
    parity.write(part, source=source, target=target, notes=notes, parity=figures, why=why,
                 text=text)
    if os.path.exists(out): shutil.rmtree(out)
    os.rename(part, out)
  finally: shutil.rmtree(part, ignore_errors=True)
  return (*notes, _said(target, figures, why))


def _said(target, figures, why: str) -> str:
  if figures is None: return f'Not compared with another engine: {why}.'
  return (f'{target.independent} computes logits that differ by {figures.relative_difference:.2g} of their norm, KL '
          f'{figures.kl:.2g} nats a token; perplexity {figures.perplexity_of_model:.4f} here, '
          f'{figures.perplexity_of_export:.4f} there.')
