"""Stages: what follows training, each a value that maps a model to another: calibrate and quantize, prune once, export.

A stage is a dataclass of a config with

  stage(model, context) -> (model, notes)     what it makes, and what it has to say, a line each
  stage.abstract(model) -> model              the same for shapes; called under `jax.eval_shape`

so that what a run has left is known by its shapes before it is read: loaded, evaluated, generated from, started from. What
does not suit a model is an `errors.Misfit`, from `abstract` too: a run asks that before it trains. Each stage's model is
saved as it is done, and adds one row to the run's ledger.
"""
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any


@dataclasses.dataclass(frozen=True)
class Context:
  """What a stage may use.

  key: for random choices. batches: n -> an iterator of n batches of training text, on the mesh, always the same ones.
  mesh: where the model lies and is to lie; None is wherever it is.
  """
  key: Any
  batches: Callable[[int], Iterator[dict[str, Any]]]
  mesh: Any = None


def folder_name(index: int, stage) -> str:
  """'1_quantize': where the model of stage number `index` (from 0) is kept, under `stages/` of a run."""
  return f'{index + 1}_{type(stage).__name__.lower()}'
