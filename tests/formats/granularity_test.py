"""Granularities: how many scales there are, and what does not divide."""
import pytest

from efficient_lm.formats import Block, Channel, Group, Int, Tensor


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


def test_names_say_what_shares_a_scale():
  assert Int(bits=4, scales=Group(size=128)).name == 'int4 per group of 128'
  assert Int(scales=Tensor()).name == 'int8 per tensor'
