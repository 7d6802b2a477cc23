"""What compiling costs: nearly all that these tests spend their time on."""
import pytest


@pytest.fixture(scope='module', autouse=True)
def quick(quick_compilation):
  """What the tests state holds of any program."""
