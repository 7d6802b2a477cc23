"""What a stage may use: its key, its place on the machine, text, and ways to save, log and measure while it goes."""
import contextlib
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from efficient_lm.parallel.sharding import place
from efficient_lm.runs.checkpoint import Checkpoints


class Context:
  """
  key: for random choices; mesh: where the model lies and is to lie; corpus: text (`data.corpus.OpenCorpus`); folder: the
  stage's own; field: the stage's place in the config, for errors; tokens_seen: of training text, by stages before.
  """

  def __init__(self, *, key, mesh, corpus, folder: Path, field: str, tokens_seen: int, training, monitor):
    self.key, self.mesh, self.corpus, self.folder, self.field = key, mesh, corpus, folder, field
    self.tokens_seen, self._training, self._monitor = tokens_seen, training, monitor
    self._checkpoints, self.followed = None, None

  def follow(self, followed: Callable):
    """For a stage that moves weights and knows only now where to: followed(before) -> after, as `runs.invariants` has it."""
    self.followed = followed

  def batches(self, count: int) -> Iterator[dict[str, Any]]:
    """Batches of training text that follow those trained on, on the mesh, always the same ones."""
    training = self._training
    batches = self.corpus.batches(batch_size=training.batch_size, sequence_length=training.sequence_length)
    following = batches.iterate(-(-self.tokens_seen // training.tokens_per_step))
    for batch in itertools.islice(following, count): yield place(batch, self.mesh)

  @property
  def sequence_length(self) -> int:
    """Tokens of a training text."""
    return self._training.sequence_length

  @property
  def outputs(self) -> Path:
    """Where a stage may leave files for people; they go when the stage is made again."""
    return self.folder.parent

  @property
  def checkpoints(self) -> Checkpoints:
    """The stage's own, to save its state in while it goes and to resume from."""
    if self._checkpoints is None: self._checkpoints = Checkpoints(self.folder)
    return self._checkpoints

  def log(self, step: int, numbers: dict[str, Any]):
    """Numbers of the stage's own step `step`, for metrics.jsonl and TensorBoard."""
    self._monitor.log(step, numbers)

  def evaluate(self, step: int, model):
    """Measures the model on held-out text, and has it write a sample."""
    self._monitor.evaluate(step, model)

  def has_evaluated(self, step: int) -> bool:
    """Whether a training, where it goes on after `step`, had been measured there."""
    return self._monitor.has_evaluated(step)

  def report(self, training, notes, state):
    """What is about to be trained, for the terminal."""
    self._monitor.report(training, notes, state)

  def progress(self, first: int, last: int) -> contextlib.AbstractContextManager[Callable]:
    """A progress bar from step `first` to `last`: a context whose value is called as advance(step, numbers or None)."""
    return self._monitor.progress(first, last)

  def close(self):
    """Waits for what is still being saved."""
    if self._checkpoints is not None: self._checkpoints.close()
