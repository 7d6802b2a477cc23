"""Chooses the implementation of an operation: by platform for 'auto', by name otherwise, never by fallback."""
from collections.abc import Callable, Mapping

import jax


def choose(op: str, implementations: Mapping[str, Callable], implementation: str, preferred: Mapping[str, str]):
  """Returns the function that implements `op`.

  Args:
    op: the operation's name, for the error message.
    implementations: name -> function.
    implementation: 'auto', or a key of `implementations`.
    preferred: platform ('cpu', 'gpu', 'tpu') -> the name that 'auto' stands for; '' is every other platform.

  Raises:
    ValueError: an implementation was named that does not exist. Another one never takes its place: a benchmark that
      silently measured something else is worse than one that stopped.
  """
  if implementation == 'auto':
    implementation = preferred.get(jax.default_backend(), preferred[''])
  if implementation not in implementations:
    names = sorted(implementations)
    raise ValueError(f"{op} has no implementation {implementation!r}: choose 'auto' or one of {names}")
  return implementations[implementation]
