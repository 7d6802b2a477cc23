"""Whether an export computes what the model does: asked of an engine that is none of this project's, and written down.

`parity.json` holds the figures and `README.md` the page of them. Where the engine is not installed, both say so: nothing is
claimed that was not computed.
"""
import dataclasses
import json
import math
import os
from importlib import metadata
from typing import Any

import numpy as np

FIGURES, PAGE = 'parity.json', 'README.md'
PACKAGES = ('jax', 'numpy', 'torch', 'transformers', 'compressed-tensors', 'llama_cpp_python', 'ai-edge-litert')


@dataclasses.dataclass(frozen=True)
class Parity:
  """What two engines make of the same tokens; `kl`: mean of KL(model || export) in nats a token."""
  tokens: int
  greatest_difference: float
  relative_difference: float
  kl: float
  perplexity_of_model: float
  perplexity_of_export: float
  same_choice: float

  @classmethod
  def of(cls, ours_BTV, theirs_BTV, tokens_BT) -> 'Parity':
    """ours_BTV, theirs_BTV: logits after each token."""
    ours, theirs = (np.asarray(logits, np.float64) for logits in (ours_BTV, theirs_BTV))
    log_p, log_q = _log_softmax(ours), _log_softmax(theirs)
    of_next = lambda log: math.exp(-np.mean(np.take_along_axis(log[:, :-1], np.asarray(tokens_BT)[:, 1:, None], -1)))
    difference = theirs - ours
    return cls(
      tokens=int(np.size(tokens_BT)), greatest_difference=float(np.abs(difference).max()),
      relative_difference=float(np.linalg.norm(difference) / np.linalg.norm(ours)),
      kl=float(np.mean(np.sum(np.exp(log_p) * (log_p - log_q), -1))), perplexity_of_model=of_next(log_p),
      perplexity_of_export=of_next(log_q), same_choice=float(np.mean(ours.argmax(-1) == theirs.argmax(-1))))


def _log_softmax(logits):
  shifted = logits - logits.max(-1, keepdims=True)
  return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def logits_of(model, tokens_BT):
  """Logits (B, T, V) of a model, computed in float32 whatever it computes in: what an engine is compared with."""
  import copy

  import jax
  exact = copy.copy(model)
  exact.dtype = 'float32'
  return np.asarray(jax.jit(lambda model, tokens_BT: model(tokens_BT).logits_BTV)(exact, tokens_BT))


def measured(target, model, out: str, tokens_BT) -> tuple[Parity | None, str]:
  """The figures of the target's independent engine, and why there are none."""
  try: theirs_BTV = target.read(out, tokens_BT)
  except ImportError as error: return None, f'{target.independent} cannot be imported here: {error}'
  except Exception as error:   # whatever an engine of others raises: the export is there, and its page says so
    said = str(error).strip().splitlines() or ['']
    return None, f'{target.independent} did not open it ({type(error).__name__}: {said[0]})'
  ours_BTV = logits_of(model, tokens_BT)
  size = min(ours_BTV.shape[-1], theirs_BTV.shape[-1])   # some leave out rows of the head that stand for no token
  return Parity.of(ours_BTV[..., :size], theirs_BTV[..., :size], tokens_BT), ''


def write(out: str, *, source: str, target, notes: tuple[str, ...], parity: Parity | None, why: str, text: str):
  """Both files, in the folder of the export. `why`: there are no figures; `text`: what they were computed on."""
  found = dict(model=source, format=target.title, settings=dataclasses.asdict(target), files=_sizes(out), notes=list(notes),
               versions=_versions(), engine=target.independent, text=text, not_checked=why or None,
               parity=None if parity is None else dataclasses.asdict(parity))
  with open(os.path.join(out, FIGURES), 'w', encoding='utf-8') as file: json.dump(found, file, indent=2, ensure_ascii=False)
  with open(os.path.join(out, PAGE), 'w', encoding='utf-8') as file: file.write(_page(found))


def _sizes(out: str) -> dict[str, int]:
  return {name: os.path.getsize(os.path.join(out, name)) for name in sorted(os.listdir(out))}


def _versions() -> dict[str, str]:
  def version(package):
    try: return metadata.version(package)
    except metadata.PackageNotFoundError: return None
  return {package: found for package in PACKAGES if (found := version(package))}


def _page(found: dict[str, Any]) -> str:
  lines = [f'# {found["model"]}: {found["format"]}', '']
  if found['parity'] is None: lines += [f'Not compared with another engine: {found["not_checked"]}.', '']
  else: lines += [*_table(found), '']
  lines += [f'- {note}' for note in found['notes']] + [''] * bool(found['notes'])
  lines += ['| file | bytes |', '| --- | ---: |', *(f'| {name} | {size:,} |' for name, size in found['files'].items())]
  return '\n'.join(lines) + '\n'


def _table(found: dict[str, Any]) -> list[str]:
  figures, versions = found['parity'], ', '.join(f'{package} {version}' for package, version in found['versions'].items())
  return [
    f'Opened by {found["engine"]}, an engine of others, on {figures["tokens"]} tokens of {found["text"]} ({versions}); all '
    f'in float32.', '', '| | model | export |', '| --- | ---: | ---: |',
    f'| perplexity | {figures["perplexity_of_model"]:.4f} | {figures["perplexity_of_export"]:.4f} |',
    f'| greatest difference of logits | | {figures["greatest_difference"]:.3g} |',
    f'| difference of logits, relative | | {figures["relative_difference"]:.3g} |',
    f'| KL(model ‖ export), nats a token | | {figures["kl"]:.3g} |',
    f'| tokens with the same first choice | | {figures["same_choice"]:.2%} |']
