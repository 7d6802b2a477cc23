"""The alphabet: letters find their dimensions."""
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from efficient_lm import axes

letters = st.lists(st.sampled_from('DRVNKFEH'), unique=True, min_size=1, max_size=4).map(''.join)


@given(letters, st.data(), st.integers(0, 2))
def test_dims_finds_letters_behind_any_stack_of_layers(name, data, num_stacked):
  sizes = {letter: i + 2 for i, letter in enumerate(name)}
  x = np.zeros([9] * num_stacked + [sizes[letter] for letter in name])
  chosen = data.draw(st.lists(st.sampled_from(name), unique=True))
  assert [x.shape[dim] for dim in axes.dims(name, ''.join(chosen))] == [sizes[letter] for letter in chosen]


def test_every_letter_that_is_split_is_split_by_an_axis_of_the_mesh():
  assert set(axes.WEIGHT.values()) | set(axes.BATCH) <= set(axes.MESH)
