"""Whether a training is still one, by the losses that it logs, and what is said of one that is not."""
import collections
import contextlib
import math
import statistics
from collections.abc import Callable
from typing import Any

from efficient_lm.errors import NonFinite

WINDOW = 20      # logged losses that a judgement rests on, at most
MARGIN = 0.01    # nats below a uniform guess from which a model counts as one that has learned something
MAX_ABSURD = 10  # logged losses in a row, each worse than a uniform guess twice and five nats more, that end a training


class Health:
  """Of one training. Its losses are *sane* where their median, since the last save, is below that of a uniform guess, ln V,
  and no more than half of what had been learned is lost: at most halfway from the lowest such median to ln V.

  uniform: ln V in nats; infinite where there is nothing to compare with. lowest: of what has been saved before.
  """

  def __init__(self, uniform: float = math.inf, lowest: float = math.inf):
    self.uniform, self.lowest = uniform, lowest
    self.recent, self.absurd, self.first = collections.deque(maxlen=WINDOW), 0, None

  def see(self, numbers: dict[str, Any]):
    """The numbers of a logged step. Of one that was refused there is nothing to learn: it changed nothing."""
    if numbers.get('skipped_in_a_row'): return
    loss = numbers.get('cross_entropy', numbers.get('loss', math.nan))
    self.absurd = 0 if loss <= 2 * self.uniform + 5 else self.absurd + 1
    self.recent.append(loss)
    if self.first is None: self.first = loss

  def sane_loss(self) -> float | None:
    """The loss of the state that is about to be saved, if it is sane. What follows is judged by what follows."""
    losses, self.recent, self.first = list(self.recent), collections.deque(maxlen=WINDOW), None
    if not losses or not all(map(math.isfinite, losses)): return None
    loss = statistics.median(losses)
    self.lowest = min(self.lowest, loss)
    sane = loss < self.uniform - MARGIN and loss <= (self.lowest + self.uniform) / 2
    return loss if sane else None

  def is_borne_out(self) -> bool | None:
    """Whether the first loss since the last save is below that of a uniform guess; None where none has been seen. The last
    update of a state shows in no loss before it."""
    return None if self.first is None else self.first < self.uniform

  def is_lost(self) -> bool:
    """Whether it has been absurd for too long to be a spike."""
    return self.absurd >= MAX_ABSURD


@contextlib.contextmanager
def advised(folder, sane_step: Callable[[], int | None]):
  """Adds to a NonFinite from inside from where the training may be taken up: the last step saved in `folder` with sane
  losses."""
  try: yield
  except NonFinite as error:
    sane = sane_step()
    kept = 'no state was saved whose losses were better than those of a uniform guess' if sane is None else (
      f'the last state whose losses were sane, step {sane}, is kept in {folder}')
    raise NonFinite(f'{error}; {kept}; lower the learning rate or look at the data') from error
