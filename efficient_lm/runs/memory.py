"""Refuses, before anything is written, a run that no program could fit into the memory of its devices.

What is counted is the least that is needed: nothing is refused that might fit, and what passes may still be too large.
"""
from flax import nnx

from efficient_lm.errors import ConfigError
from efficient_lm.parallel.memory import available
from efficient_lm.runs.ledger import quantity
from efficient_lm.tree import num_bytes


def check_model(shapes, described, devices, field: str):
  """Raises ConfigError where a model of these shapes and the gradients of its parameters are more than the devices hold.
  `described`: what the config has at `field`."""
  needed = num_bytes(shapes) + num_bytes(nnx.state(shapes, nnx.Param))
  _refuse(needed, devices, field, described, 'with the gradients of its parameters it')


def check_batch(training, dim: int, devices, field: str):
  """Raises ConfigError where a number in 16 bits for each of `dim` channels, of all tokens that are computed at once, is
  more than the devices hold."""
  rows, length = training.batch_size // training.accumulate, training.sequence_length
  name = 'sequence_length' if length > rows else 'batch_size'
  _refuse(rows * length * dim * 2, devices, f'{field}.{name}', getattr(training, name),
          f'one array of {rows} x {length} tokens x {dim} channels')


def _refuse(needed: int, devices, field: str, value, what: str):
  if needed <= (room := available(devices)): return
  needed, room = (quantity(size, 'B', 1024) for size in (needed, room))
  raise ConfigError(field, value, f'is too large: {what} takes {needed}, and all devices have {room}')
