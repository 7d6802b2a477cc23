"""Second-order statistics of what a weight multiplies: the Hessian of its squared output error, made safe, and factored.

A change D of a weight W (O, I) that multiplies rows x (M, I) changes the output by x D^T, whose square sums to tr(D G D^T)
with the Gram matrix G = x^T x. So G is half the Hessian of each row's error, the same for all rows. Everything here takes
stacks (..., I, I), of layers or experts, and computes in float32.

Why float32 is safe. G is singular wherever calibration saw fewer tokens than inputs, and the magnitudes of its diagonal
span orders. (1) It is divided by the mean of its diagonal first, so no sum of squares overflows or vanishes, and `damping`
means the same for all weights. (2) Inputs that were never active get a diagonal of 1: their rows and columns are zero,
so they take no part, and nothing is divided by zero. (3) What algorithms need is a factor of the inverse, and that is had
by one Cholesky factorisation and one triangular solve, without forming the inverse: the error grows with the square root
of the condition number, at most about I / damping, and not with the number itself. (4) Where rounding still leaves
a matrix that is not positive definite (its Cholesky factor is NaN), damping grows tenfold until it is.
"""
import jax
import jax.numpy as jnp
from jax import lax

MOST_DAMPING = 100.   # times the mean of the diagonal, where a matrix is the identity for all that matters


def diagonal(matrix_II):
  """(..., I, I) -> (..., I)."""
  return jnp.diagonal(matrix_II, axis1=-2, axis2=-1)


def scaled(gram_II):
  """gram over the mean of its live diagonal, float32; 1 on the diagonal of inputs that were never active."""
  gram_II = gram_II.astype(jnp.float32)
  diagonal_I = diagonal(gram_II)
  live_I = diagonal_I > 0
  mean_11 = jnp.sum(diagonal_I, -1) / jnp.maximum(jnp.sum(live_I, -1), 1)
  mean_11 = jnp.where(mean_11 > 0, mean_11, 1)[..., None, None]
  return gram_II / mean_11 + jnp.where(live_I, 0., 1.)[..., None, :] * jnp.eye(gram_II.shape[-1])


def inverse_factor(gram_II, damping: float):
  """U_II, upper triangular, with U^T U = H^-1 for H = scaled(gram) + damping * I; damping grows where H is not definite.

  With J the reversal of order, J H J = L L^T gives H = R R^T for R = J L J, which is upper triangular; so U = R^-1.
  """
  hessian_II, eye_II = scaled(gram_II), jnp.eye(gram_II.shape[-1])

  def lower(damping_11):
    return jnp.linalg.cholesky(jnp.flip(hessian_II + damping_11 * eye_II, (-2, -1)))

  def failed(lower_II, damping_11):
    return ~jnp.isfinite(jnp.sum(lower_II, (-2, -1), keepdims=True)) & (damping_11 < MOST_DAMPING)

  def again(carry):
    lower_II, damping_11 = carry
    damping_11 = jnp.where(failed(lower_II, damping_11), jnp.maximum(10 * damping_11, 1e-4), damping_11)
    return lower(damping_11), damping_11

  with jax.default_matmul_precision('highest'):
    start = jnp.full((*hessian_II.shape[:-2], 1, 1), damping, jnp.float32)
    lower_II, _ = lax.while_loop(lambda carry: jnp.any(failed(*carry)), again, (lower(start), start))
    upper_II = jnp.flip(lower_II, (-2, -1))
    whole_II = jnp.broadcast_to(eye_II, upper_II.shape)
    return lax.linalg.triangular_solve(upper_II, whole_II, left_side=True, lower=False)


def output_error(change_OI, gram_II):
  """The squared output error of a change of weights, of each row: (..., O), the diagonal of change @ gram @ change^T."""
  product_OI = jnp.matmul(change_OI, gram_II, precision='highest')
  return jnp.sum(product_OI * change_OI, -1)
