"""The two runs that other configs are changes of."""
import pytest

from efficient_lm.config import experiment, presets
from efficient_lm.runs import measure
from efficient_lm.training.learner import new_model


@pytest.mark.parametrize('size', presets.SIZES)
def test_the_mixture_of_a_size_has_the_dense_models_active_parameters_and_its_training(size):
  import jax
  dense, mixture = presets.dense(size), presets.mixture(size)
  counts = [measure.parameters(jax.eval_shape(lambda key, made=made: new_model(made.model, key), jax.random.key(0)))
            for made in (dense, mixture)]
  num_layers = sum(stack.num_layers for stack in mixture.model.stacks)
  routers = num_layers * mixture.model.dim * mixture.model.stacks[0].mlp.num_experts
  assert counts[1].active == counts[0].active + routers and counts[1].total > 2 * counts[0].total
  assert dense.train == mixture.train and dense.data == mixture.data


@pytest.mark.parametrize('variant', presets.DENSE)
def test_the_shapes_are_valid(variant):
  experiment.validate(presets.dense(variant))
