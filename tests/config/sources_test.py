"""Sources are told by what they can do."""
import dataclasses

from efficient_lm.config import sources
from efficient_lm.models import zoo
from efficient_lm.runs import FromRun


@dataclasses.dataclass
class Mine:
  """A user's own."""
  def spec(self): return zoo.tiny()
  def abstract(self): ...
  def load(self, mesh): ...
  def tokenizer(self): ...
  def key(self): return 'mine'


def test_a_source_is_told_by_what_it_can_do():
  assert sources.is_source(FromRun(path='a')) and sources.is_source(Mine())
  assert not sources.is_source(zoo.tiny()) and not sources.is_source('runs/a') and not sources.is_source(None)
