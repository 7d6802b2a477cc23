"""A signal to one of several processes is heard by all of them, wherever they are, and all end with the code of that.

It is told through the coordinator by which the processes have found each other, and not by way of the devices. So it is
heard in a compilation too, and by one that waits in a product for another that has stopped. Until all have met
(`processes.join`) there is no coordinator: a signal ends the one that it was sent to, and the others when their patience is
over.
"""
import contextlib
import time

from efficient_lm.system import interruption

TOLD, LEFT, LEAVING = 'efficient_lm/signal', 'efficient_lm/left', 'efficient_lm/leaving'
TOGETHER = 15   # seconds that a process which is to end waits for those that are not so far
AFTER = 0.5     # seconds that the one which has the coordinator stays after the others: without it JAX would abort them


class Others:
  """The other processes, for `interruption.share`. client: JAX's, of its coordinator, which is of no use once that has gone:
  then nothing is told, and whoever asks hears nothing."""

  def __init__(self, client, is_coordinator: bool):
    self.client, self.is_coordinator = client, is_coordinator

  def tell(self, number: int):
    """That this process was sent the signal `number`."""
    self._note(TOLD, str(number))

  def told(self) -> int | None:
    """The signal that one of the processes was sent, if any was."""
    found = self._noted(TOLD)
    return None if found is None else int(found)

  def left(self) -> bool:
    """Whether one of them has come to its end, and takes no part any more."""
    return self._noted(LEFT) is not None

  def leave(self):
    """Returns when all of them are about to end, or after TOGETHER seconds."""
    self._note(LEFT, 'yes')
    with contextlib.suppress(Exception): self.client.wait_at_barrier(LEAVING, TOGETHER * 1000)
    if self.is_coordinator: time.sleep(AFTER)

  def _note(self, name: str, text: str):
    with contextlib.suppress(Exception): self.client.key_value_set(name, text, allow_overwrite=True)

  def _noted(self, name: str) -> str | None:
    with contextlib.suppress(Exception): return self.client.key_value_try_get(name)   # raises where nobody has
    return None


def share():
  """Has signals to any of the processes be heard by all. Once they have met."""
  from jax._src import distributed  # as Orbax does: JAX has no public name for it
  state = distributed.global_state
  interruption.share(Others(state.client, state.service is not None))
