"""Numbers by their letters, and weights as trained and as stored, for the tests of weights."""
import jax.numpy as jnp
import numpy as np

from efficient_lm.weights.fake_quantized import FakeQuantized
from efficient_lm.weights.quantizers import Rounding
from efficient_lm.weights.weight import Dense

SIZES = dict(B=2, T=3, D=64, F=32, N=2, H=32, V=40, E=4, R=32)
EQUATIONS = [('BTD,DNH->BTNH', 'D'), ('BTNH,NHD->BTD', 'NH'), ('BTD,DF->BTF', 'D'), ('BTR,RNH->BTNH', 'R')]


def draw(letters, seed=0):
  return jnp.asarray(np.random.default_rng(seed).normal(size=[SIZES[letter] for letter in letters]), jnp.float32)


def pair(equation, inputs, format, activations=None):
  """A weight as trained and as stored, and what they are multiplied with."""
  x_axes, w_axes = equation.split('->')[0].split(',')
  rounding = None if activations is None else Rounding(activations)
  trained = FakeQuantized(Dense(draw(w_axes), w_axes, inputs), Rounding(format), rounding)
  return trained, trained.converted(), draw(x_axes, seed=1)
