"""Chooses the implementation of an operation: by platform when asked for 'auto', by name otherwise, never by fallback."""

from collections.abc import Callable, Mapping

import jax


def choose(op: str, implementations: Mapping[str, Callable], implementation: str, preferred: Mapping[str, str]) -> Callable:
  """Returns the function that implements `op`.

  Args:
    op: the operation's name, for the error message.
    implementations: name -> function.
    implementation: 'auto', or a key of `implementations`.
    preferred: platform ('cpu', 'gpu', 'tpu') -> the name that 'auto' stands for there; '' is any other platform.

  Raises:
    ValueError: an implementation was named that does not exist. A request is never replaced by another kernel, because
      a benchmark that silently measured something else is worse than one that stopped.
  """
  if implementation == 'auto':
    implementation = preferred.get(jax.default_backend(), preferred[''])
  if implementation not in implementations:
    raise ValueError(f"{op} has no implementation {implementation!r}; choose 'auto' or one of {sorted(implementations)}.")
  return implementations[implementation]


def require_platform(op: str, implementation: str, *platforms: str) -> None:
  """Raises NotImplementedError unless the default backend is one of `platforms`."""
  if jax.default_backend() not in platforms:
    raise NotImplementedError(
        f'{op} implementation {implementation!r} runs on {" or ".join(platforms)}, not on {jax.default_backend()}.')
