"""Granularities: how many scales there are, what does not divide, and what is fitted so that it does."""
import pytest
from hypothesis import given
from hypothesis import strategies as st

from efficient_lm.errors import IncompatibleError
from efficient_lm.formats import MXFP4, MXFP8, NVFP4, Block, Channel, Float8, Group, Int, Tensor
from tests.formats.every import FORMATS


@pytest.mark.parametrize('scales, counts', [(Tensor(), (1, 1)), (Channel(), (12, 1)), (Group(size=16), (12, 4)),
                                            (Block(outputs=4, inputs=32), (3, 2))], ids=lambda x: getattr(x, 'name', ''))
def test_a_matrix_has_so_many_scales(scales, counts):
  assert scales.counts(12, 64) == counts


def test_what_does_not_divide_is_named():
  with pytest.raises(ValueError, match='groups of 48 do not divide 64 inputs'): Group(size=48).counts(12, 64)
  with pytest.raises(ValueError, match='blocks of 8 x 32 do not divide 12 outputs x 64 inputs'):
    Block(outputs=8, inputs=32).counts(12, 64)


def test_wrong_sizes_are_named():
  assert [field for field, _, _ in Group(size=0).check()] == ['size']
  assert [field for field, _, _ in Block(outputs=0, inputs=0).check()] == ['outputs', 'inputs']


sizes, dimensions = st.integers(1, 300), st.integers(1, 3000)


def divisors(dimension: int, most: int) -> list[int]:
  return [size for size in range(1, most + 1) if dimension % size == 0]


@given(sizes, dimensions)
def test_a_fitted_group_divides_and_is_the_longest_that_may_be(size, dimension):
  """At most the asked size and at least a quarter of it; a multiple of 8 where there is one; or refused, with a size to
  choose that fits."""
  kept = [divisor for divisor in divisors(dimension, size) if 4 * divisor >= size]
  try: fitted = Group(size=size).fitted(7, dimension).size
  except IncompatibleError as error:
    assert not kept and size < dimension and '\n' not in str(error)
    chosen = int(str(error).rpartition('choose size=')[2])
    assert Group(size=chosen).fitted(7, dimension) == Group(size=chosen) and chosen > size
    return
  assert Group(size=fitted).counts(7, dimension) == (7, dimension // fitted)
  if size >= dimension: assert fitted == dimension
  elif dimension % size == 0: assert fitted == size
  else: assert fitted == max([divisor for divisor in kept if divisor % 8 == 0] or kept)


@given(sizes, dimensions)
def test_fitting_twice_is_fitting_once(size, dimension):
  try: once = Group(size=size).fitted(7, dimension)
  except IncompatibleError: return
  assert once.fitted(7, dimension) == once


@given(sizes, sizes, dimensions, dimensions)
def test_each_side_of_a_block_is_fitted_as_a_group_is(outputs, inputs, rows, columns):
  def side(size, dimension):
    try: return Group(size=size).fitted(1, dimension).size
    except IncompatibleError: return None
  wanted = side(outputs, rows), side(inputs, columns)
  if None not in wanted:
    assert Block(outputs=outputs, inputs=inputs).fitted(rows, columns) == Block(outputs=wanted[0], inputs=wanted[1])
  else:
    with pytest.raises(IncompatibleError, match='choose'): Block(outputs=outputs, inputs=inputs).fitted(rows, columns)


@pytest.mark.parametrize('format', FORMATS, ids=lambda format: format.name)
def test_a_format_that_fits_is_itself_fitted(format):
  assert format.fitted(16, 64) == format and type(format.fitted(16, 64)) is type(format)


def test_all_of_a_format_but_the_size_stays():
  asked, found = (Int(bits=4, symmetric=False, scales=Group(size=size)) for size in (128, 96))
  assert asked.fitted(64, 576) == found
  asked, found = (Float8(variant='e5m2', scales=scales) for scales in (Block(), Block(outputs=64, inputs=96)))
  assert asked.fitted(64, 576) == found
  assert Int(scales=Tensor()).fitted(7, 1021) == Int(scales=Tensor()) and Int().fitted(7, 1021) == Int()


@pytest.mark.parametrize('format', [MXFP8(), MXFP4(), NVFP4()], ids=lambda format: format.element)
def test_groups_of_a_standard_are_never_changed(format):
  """They are refused in the words of `counts`, also where a shorter group would fit."""
  assert format.fitted(3, 96) is format
  for inputs in (8, 24, 1021):
    said = f'groups of {format.scales.size} do not divide {inputs} inputs'
    with pytest.raises(IncompatibleError, match=said): format.fitted(3, inputs)


def test_a_prime_is_refused_in_one_line_that_names_a_size():
  refused = r'^1021 inputs have no divisor from 32 to 128, for size=128: choose size=1021$'
  with pytest.raises(IncompatibleError, match=refused):
    Int(bits=4, scales=Group(size=128)).fitted(64, 1021)


def test_names_say_what_shares_a_scale():
  assert Int(bits=4, scales=Group(size=128)).name == 'int4 per group of 128'
  assert Int(scales=Tensor()).name == 'int8 per tensor'
