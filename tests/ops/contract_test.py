"""Every implementation of the product of activations with a weight is the einsum, in value and in gradient."""
import string

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies

from efficient_lm.ops.contract import contract

SIZES = dict(B=2, T=5, D=12, N=3, H=4, F=20, V=7, E=3, R=6)
MATRIX = ['BTD,DF->BTF', 'BTF,FD->BTD', 'BTD,DNH->BTNH', 'BTNH,NHD->BTD', 'BTD,VD->BTV', 'MD,DF->MF', 'BD,DF->BF']
OTHER = ['BTD,EDF->BTEF', 'BTEF,EFD->BTED', 'BTNH,RNH->BTNR', 'BTNR,RNH->BTNH', 'BTHN,NHD->BTD']


def operands(equation, dtype=jnp.float32):
  sizes = dict(SIZES, M=10)
  keys = jax.random.split(jax.random.key(0), 3)
  shapes = [[sizes[letter] for letter in axes] for axes in equation.replace('->', ',').split(',')]
  return [jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True)]


def both_passes(equation, x, w, g, **options):
  y, gradient = jax.vjp(lambda x, w: contract(equation, x, w, **options), x, w)
  return y, *gradient(g.astype(y.dtype))


@pytest.mark.thinned
@pytest.mark.parametrize('equation', MATRIX)
def test_a_product_of_matrices_is_the_einsum(equation):
  x, w, g = operands(equation)
  expected = both_passes(equation, x, w, g, implementation='einsum')
  for e, a in zip(expected, both_passes(equation, x, w, g, implementation='matrix'), strict=True):
    np.testing.assert_allclose(a, e, rtol=1e-5, atol=1e-5)   # sums of at most 20 normals


@pytest.mark.parametrize('num_outputs', [1, 6, 7])
def test_a_product_of_one_row_is_the_einsum(num_outputs):
  x, w, g = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(
    [(1, 1, 12), (num_outputs, 12), (1, 1, num_outputs)]))
  expected = both_passes('BTD,VD->BTV', x, w, g, implementation='einsum')
  for e, a in zip(expected, both_passes('BTD,VD->BTV', x, w, g, implementation='matrix'), strict=True):
    np.testing.assert_allclose(a, e, rtol=1e-5, atol=1e-5)   # sums of 12 products of normals


@pytest.mark.thinned
@pytest.mark.parametrize('equation', OTHER)
def test_auto_does_every_equation_and_matrix_refuses_what_it_cannot(equation):
  x, w, _ = operands(equation)
  np.testing.assert_array_equal(contract(equation, x, w), jnp.einsum(equation, x, w))
  with pytest.raises(ValueError, match='no product of matrices'):
    contract(equation, x, w, implementation='matrix')


@hypothesis.given(strategies.data())
@hypothesis.settings(max_examples=40, deadline=None)
def test_any_equation(data):
  """For any letters in any order, 'auto' is the einsum."""
  letters = string.ascii_uppercase[:5]
  x_axes = ''.join(data.draw(strategies.permutations(letters))[:data.draw(strategies.integers(1, 4))])
  w_axes = ''.join(data.draw(strategies.permutations(letters))[:data.draw(strategies.integers(1, 4))])
  every = [letter for letter in letters if letter in x_axes + w_axes]
  result = ''.join(data.draw(strategies.permutations(every))[:data.draw(strategies.integers(0, len(every)))])
  equation = f'{x_axes},{w_axes}->{result}'
  x, w = (np.arange(np.prod([2 + letters.index(letter) for letter in axes], dtype=int), dtype=np.float32).reshape(
    [2 + letters.index(letter) for letter in axes]) % 5 for axes in (x_axes, w_axes))
  np.testing.assert_allclose(contract(equation, jnp.array(x), jnp.array(w)), np.einsum(equation, x, w), rtol=1e-6)


@pytest.mark.parametrize('implementation', ['einsum', 'matrix'])
def test_dtypes(implementation):
  """The result has the dtype that is asked for, and the gradients have those of the operands."""
  x, w, g = operands('BTD,DF->BTF', jnp.bfloat16)
  for dtype, expected in ((None, jnp.bfloat16), (jnp.float32, jnp.float32)):
    y, dx, dw = both_passes('BTD,DF->BTF', x, w, g, dtype=dtype, implementation=implementation)
    assert (y.dtype, dx.dtype, dw.dtype) == (expected, jnp.bfloat16, jnp.bfloat16)


def test_unknown_implementations_are_refused():
  x, w, _ = operands('BTD,DF->BTF')
  with pytest.raises(ValueError, match="no implementation 'cublas'"): contract('BTD,DF->BTF', x, w, implementation='cublas')
