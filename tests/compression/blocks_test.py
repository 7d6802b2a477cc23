"""At least the share that was asked for is gone, and no block more than it takes."""
import pytest
from hypothesis import given
from hypothesis import strategies as st

from efficient_lm.compression.blocks import kept_of
from efficient_lm.errors import IncompatibleError


@given(st.integers(1, 500), st.integers(1, 99))
def test_at_least_the_share_is_gone_and_no_block_more(num_rows, percent):
  """In integers, which round nothing."""
  wanted = num_rows * (100 - percent) // 100
  if wanted: assert kept_of(num_rows, percent / 100) == wanted
  else:
    with pytest.raises(IncompatibleError, match=f'has {num_rows} blocks along its inputs'): kept_of(num_rows, percent / 100)
