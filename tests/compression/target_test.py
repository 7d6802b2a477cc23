"""What a training is to end with can be said, or is refused by its field."""
import jax.numpy as jnp
import pytest

from efficient_lm.compression.allocation import Erk, Global, Owl, Uniform
from efficient_lm.compression.patterns import Blocks, NofM, PerMatrix
from efficient_lm.compression.sparse_updates import Parameter
from efficient_lm.compression.target import Target
from efficient_lm.errors import IncompatibleError
from efficient_lm.weights.weight import Dense


@pytest.mark.parametrize('target, fields', [
  (Target(0.5, PerMatrix(), Uniform()), []), (Target(0., NofM(), Uniform()), []), (Target(0.75, NofM(n=1), Uniform()), []),
  (Target(1., PerMatrix(), Uniform()), ['sparsity']), (Target(0.6, NofM(), Uniform()), ['sparsity']),
  (Target(0.5, NofM(), Erk()), ['allocation']), (Target(0.5, PerMatrix(), Global()), ['allocation']),
  (Target(0.5, PerMatrix(), Owl()), ['allocation'])], ids=str)
def test_what_is_not_possible_is_named_by_its_field(target, fields):
  assert [field for field, _, _ in target.check()] == fields


def test_shares_are_those_of_the_allocation_and_together_the_sparsity():
  weights = {'small': Dense(jnp.ones((3, 4, 4)), 'EDF', 'D'), 'large': Dense(jnp.ones((2, 64, 32)), 'DF', 'D')}
  parameters = {path: Parameter.of(weight.array) for path, weight in weights.items()}
  assert Target(0.5, PerMatrix(), Uniform()).shares(parameters) == {'small': 0.5, 'large': 0.5}
  shares, sizes = Target(0.5, PerMatrix(), Erk()).shares(parameters), {'small': 48, 'large': 4096}
  assert shares['small'] == 0 < shares['large']
  assert sum(shares[path] * sizes[path] for path in sizes) == pytest.approx(0.5 * sum(sizes.values()), rel=1e-6)


def test_what_does_not_divide_is_refused():
  weight = Dense(jnp.ones((8, 4)), 'DF', 'D')
  for pattern in (Blocks(outputs=3, inputs=4), NofM(n=2, m=3)):
    with pytest.raises(IncompatibleError, match='divide'): Target(0.5, pattern, Uniform()).check_fits(weight)
  Target(0.5, Blocks(outputs=2, inputs=4), Uniform()).check_fits(weight)


def test_it_is_named_in_a_few_words():
  assert Target(0.5, PerMatrix(), Uniform()).name == '50%' and Target(0.5, NofM(), Uniform()).name == '2:4, 50%'
