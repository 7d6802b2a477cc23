"""What a stage may use: its key, its place on the machine, text, and ways to save, log and measure while it goes."""
import contextlib
import itertools
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from efficient_lm.errors import Preempted, WriteError
from efficient_lm.parallel.sharding import place
from efficient_lm.runs.checkpoint import Checkpoints

log = logging.getLogger(__name__)


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

  def __enter__(self): return self

  def __exit__(self, kind, error, traceback):
    """Waits for what is still being saved. Where that fails, it is the error, also at the end by a signal, which would say
    that all is saved; any other error before it stands, and this is a warning."""
    if self._checkpoints is None: return
    try: self._checkpoints.close()
    except WriteError as late:
      if error is None or isinstance(error, Preempted): raise
      log.warning('%s', late)
