"""Expert parallelism: tokens travel to the devices that hold their experts, and their results travel back.

Routing is decided outside, on global arrays, so losses and metrics are global. Here one `shard_map` takes each device's
tokens and routing, moves rows by one of the transports of `routing.Dispatch`, and runs the device's own experts on rows
sorted by expert. Lower-case letters are local shards. Without a mesh, or where it splits nothing, the same code runs
without a map.
"""
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from efficient_lm import axes as alphabet
from efficient_lm.errors import ConfigError
from efficient_lm.models.moe.routing import Dispatch
from efficient_lm.models.moe.rows import permute, sort_rows
from efficient_lm.parallel.sharding import axes_of, splitting_mesh, weight_spec
from efficient_lm.tree import is_variable

# What the remat policy 'transport' saves, so that the backward pass does not move all tokens a second time.
ARRIVED, RETURNED = 'moe_arrived', 'moe_returned'
BATCH = PartitionSpec(alphabet.BATCH)


def dispatch_experts(experts: Callable, x_BTD, routing, dispatch: Dispatch, num_experts: int):
  """Runs each token through the experts that `routing` gives it and sums their results with its gates.

  Args:
    experts: a module, `experts(x_MD, sizes_E) -> y_MD`, each row's result depending on that row only and zero for rows
      past sum(sizes_E). Leaves are split as their Variables' axes say, 'fsdp' apart: those are gathered.
    x_BTD: tokens, B a multiple of the mesh's data * fsdp * expert.
    routing: TokenChoice or ExpertsChoice.
    dispatch: the transport and its buffer.
    num_experts: of all devices together, a multiple of the mesh's expert axis.

  Returns:
    y_BTD and the number of rows dropped for lack of buffer (a float32 scalar, global; always 0 if dispatch.buffer is
    None).

  Raises:
    ConfigError: a size does not divide, or the platform lacks the transport.
  """
  mesh = splitting_mesh()
  shards = mesh.shape['expert'] if mesh else 1
  device = mesh.abstract_device if mesh else None
  platform = jax.default_backend() if device is None else device.platform
  active = routing.expert_R.size / (x_BTD.shape[0] * x_BTD.shape[1])
  run = functools.partial(TRANSPORTS[dispatch.resolve(platform, shards, active)], num_experts=num_experts,
                          buffer=dispatch.buffer)
  if mesh is None or mesh.size == 1: return _flat(run, experts, x_BTD, routing)
  _check_divides('num_experts', num_experts, 'expert', shards)
  _check_divides('batch', x_BTD.shape[0], 'data * fsdp * expert', math.prod(mesh.shape[n] for n in alphabet.BATCH))

  leaves, treedef = jax.tree.flatten(experts)
  specs = weight_specs(experts, mesh)
  summed = ('tensor',) if any('tensor' in spec for spec in specs) else ()

  def local(leaves, x_bTD, routing):
    y_bTD, dropped = _flat(run, jax.tree.unflatten(treedef, leaves), x_bTD, routing)
    # Each tensor shard holds a part of every sum over F. Tokens are fewer than rows: reduce after combining.
    return lax.psum(y_bTD, summed) if summed else y_bTD, lax.psum(dropped, alphabet.BATCH)

  # vma checking would need every kernel below to declare what it varies over.
  mapped = jax.shard_map(local, in_specs=(specs, BATCH, BATCH), out_specs=(BATCH, PartitionSpec()), check_vma=False)
  return mapped(leaves, x_BTD, routing)


def weight_specs(tree, mesh) -> list[PartitionSpec]:
  """How each leaf of `tree` enters the map: as `sharding.weight_spec` lays it out, gathered over 'fsdp'.

  'tensor' cuts all leaves with a letter that it cuts, or none: codes of 24 inputs divide in two where the three scales of
  their groups do not, and each device must hold what belongs together. A dimension of 1 is shared by all.
  """
  leaves = [(axes_of(node), leaf.shape) for node in jax.tree.leaves(tree, is_leaf=is_variable)
            for leaf in jax.tree.leaves(node)]
  specs = [weight_spec(axes, shape, mesh) for axes, shape in leaves]
  left = any('tensor' not in spec and _has_width(axes, shape) for (axes, shape), spec in zip(leaves, specs))
  gathered = ('fsdp', 'tensor') if left else ('fsdp',)
  return [PartitionSpec(*[None if name in gathered else name for name in spec]) for spec in specs]


def _has_width(axes: str, shape: tuple[int, ...]) -> bool:
  """Whether a matrix has a dimension of more than 1 that 'tensor' would cut if it divided it."""
  sizes = shape[len(shape) - len(axes):]
  return len(axes) > 1 and any(alphabet.WEIGHT.get(letter) == 'tensor' and size > 1 for letter, size in zip(axes, sizes))


def _check_divides(what: str, size: int, axis: str, shards: int):
  if size % shards: raise ConfigError(what, size, f'must be a multiple of {axis} = {shards} of the mesh')


def _flat(run, experts, x_BTD, routing):
  y_MD, dropped = run(experts, x_BTD.reshape(-1, x_BTD.shape[-1]), routing)
  return y_MD.reshape(x_BTD.shape), dropped


def _local(experts, x_MD, routing, *, num_experts, buffer):
  """Every expert is here: nothing travels, nothing overflows."""
  order_R, slot_R, sizes_E = sort_rows(routing.expert_R, num_experts, routing.expert_R.size)
  y_RD = experts(routing.spread(x_MD, order_R, slot_R), sizes_E)
  return routing.combine(y_RD, order_R, slot_R), jnp.float32(0)


def _gather(experts, x_mD, routing, *, num_experts, buffer):
  """All tokens of the expert axis come here; only rows of the experts that are here are computed and sent back."""
  shards = lax.axis_size('expert')
  num_local, balanced = num_experts // shards, routing.expert_R.size
  gather = lambda x: lax.all_gather(x, 'expert', tiled=True)
  x_MD, routing = checkpoint_name(gather(x_mD), ARRIVED), jax.tree.map(gather, routing)
  expert_R = routing.expert_R - lax.axis_index('expert') * num_local
  expert_R = jnp.where((expert_R >= 0) & (expert_R < num_local), expert_R, num_local)
  slots = _slots(buffer, balanced, routing.most_rows(num_local, num_experts))
  order_C, slot_R, sizes_e = sort_rows(expert_R, num_local, slots)
  y_CD = experts(routing.spread(x_MD, order_C, slot_R), sizes_e)
  y_MD = routing.combine(y_CD, order_C, slot_R)
  y_mD = lax.psum_scatter(y_MD, 'expert', scatter_dimension=0, tiled=True)
  return checkpoint_name(y_mD, RETURNED), jnp.sum(expert_R < num_local) - jnp.sum(sizes_e).astype(jnp.float32)


def _slots(buffer: float | None, balanced: float, worst: int) -> int:
  return worst if buffer is None else min(worst, math.ceil(buffer * balanced))


def _a2a(experts, x_mD, routing, *, num_experts, buffer):
  """Each device sends every other one a block of `pair` slots, full or not."""
  shards = lax.axis_size('expert')
  num_local, num_rows = num_experts // shards, routing.expert_R.size
  order_R, slot_R, sizes_E = sort_rows(routing.expert_R, num_experts, num_rows)
  pair = _slots(buffer, num_rows / shards, routing.most_rows(num_local, num_experts))
  wanted_SE = lax.all_gather(sizes_E, 'expert').reshape(shards, shards, num_local)
  kept_SE = _within(wanted_SE, pair)
  wanted_S, kept_S = (jnp.sum(x[lax.axis_index('expert')], -1) for x in (wanted_SE, kept_SE))

  # Slot (s, j) of what is sent holds the j-th row, by expert, of those that go to device s.
  start_S, j = _starts(wanted_S), jnp.arange(pair)
  row_C = jnp.where(j < kept_S[:, None], start_S[:, None] + j, num_rows).reshape(-1)
  order_C = jnp.append(order_R, num_rows)[row_C]
  to_R = jnp.minimum(routing.expert_R // num_local, shards)
  j_R = slot_R - jnp.append(start_S, 0)[to_R]
  slot_R = jnp.where((to_R < shards) & (j_R < pair), to_R * pair + j_R, shards * pair)

  def exchange(x_CD):
    return lax.all_to_all(x_CD.reshape(shards, pair, -1), 'expert', 0, 0).reshape(x_CD.shape)
  arrived_CD = checkpoint_name(exchange(routing.spread(x_mD, order_C, slot_R)), ARRIVED)
  here_Se = kept_SE[:, lax.axis_index('expert')]
  y_CD = _by_expert(experts, arrived_CD, jnp.arange(shards) * pair, here_Se)
  returned_CD = checkpoint_name(exchange(y_CD), RETURNED)
  return routing.combine(returned_CD, order_C, slot_R), jnp.sum(wanted_S - kept_S).astype(jnp.float32)


def _ragged(experts, x_mD, routing, *, num_experts, buffer, transfer):
  """Each device sends every other one exactly the rows that it holds for it, packed into one buffer at the receiver."""
  shards, me = lax.axis_size('expert'), lax.axis_index('expert')
  num_local, num_rows = num_experts // shards, routing.expert_R.size
  order_R, slot_R, sizes_E = sort_rows(routing.expert_R, num_experts, num_rows)
  slots = _slots(buffer, num_rows, routing.most_rows(num_local, num_experts) * shards)
  wanted_SSe = lax.all_gather(sizes_E, 'expert').reshape(shards, shards, num_local)   # from, to, expert there
  wanted_SS = jnp.sum(wanted_SSe, -1)
  kept_SSe = _within(wanted_SSe, jnp.maximum(slots - _starts(wanted_SS), 0))
  kept_SS = jnp.sum(kept_SSe, -1)
  # Both ends compute all offsets: a block lies at `leave` where rows are sorted for sending, at `land` where received.
  leave_SS, land_SS = _starts(wanted_SS, 1), _starts(kept_SS)

  sent_RD = routing.spread(x_mD, order_R, slot_R)
  arrived_CD = jnp.zeros((slots, x_mD.shape[-1]), x_mD.dtype)   # rows past the last one stay zero, never garbage
  arrived_CD = transfer(sent_RD, arrived_CD, leave_SS[me], kept_SS[me], land_SS[me], kept_SS[:, me])
  y_CD = _by_expert(experts, checkpoint_name(arrived_CD, ARRIVED), land_SS[:, me], kept_SSe[:, me])
  returned_RD = transfer(y_CD, jnp.zeros_like(sent_RD), land_SS[:, me], kept_SS[:, me], leave_SS[:, me], kept_SS[me])
  y_mD = routing.combine(checkpoint_name(returned_RD, RETURNED), order_R, slot_R)
  return y_mD, jnp.sum(wanted_SS[me] - kept_SS[me]).astype(jnp.float32)


def _starts(sizes, axis: int = 0):
  """Where each block starts when blocks of these sizes lie one after the other."""
  return jnp.cumsum(sizes, axis) - sizes


def _within(sizes_e, room):
  """Sizes of consecutive groups (last dimension) once only the first `room` of all their rows are kept."""
  return jnp.diff(jnp.minimum(jnp.cumsum(sizes_e, -1), jnp.asarray(room)[..., None]), prepend=0)


def _by_expert(experts, arrived_CD, start_S, size_Se):
  """Runs the local experts on rows that arrived by source, and within a source by expert; results in the same slots."""
  num_slots, num_local = arrived_CD.shape[0], size_Se.shape[1]
  slot_C = jnp.arange(num_slots)
  source_C = jnp.searchsorted(start_S, slot_C, side='right') - 1
  place_C = slot_C - start_S[source_C]
  expert_C = jnp.sum(place_C[:, None] >= jnp.cumsum(size_Se, 1)[source_C], -1)   # all of them: an empty slot
  order_C, slot_C, size_e = sort_rows(expert_C, num_local, num_slots)
  y_CD = experts(permute(arrived_CD, order_C, slot_C), size_e)
  return permute(y_CD, slot_C, order_C)


def _ragged_all_to_all(operand, output, leave, send, land, receive):
  offsets = (x.astype(jnp.int32) for x in (leave, send, land, receive))
  return lax.ragged_all_to_all(operand, output, *offsets, axis_name='expert')


def _emulated(operand, output, leave, send, land, receive):
  """lax.ragged_all_to_all with the same arguments, from an all_gather: any platform, at the cost of one."""
  me, slot_C = lax.axis_index('expert'), jnp.arange(output.shape[0])
  operands, leaves, lands = (lax.all_gather(x, 'expert') for x in (operand, leave, land))
  for source in range(lax.axis_size('expert')):
    place_C = slot_C - lands[source, me]
    inside_C = (place_C >= 0) & (place_C < receive[source])
    rows_CD = operands[source].at[leaves[source, me] + place_C].get(mode='clip')
    output = jnp.where(inside_C[:, None], rows_CD, output)
  return output


TRANSPORTS = {
  'local': _local, 'gather': _gather, 'a2a': _a2a,
  'ragged': functools.partial(_ragged, transfer=_ragged_all_to_all),
  'ragged_emulated': functools.partial(_ragged, transfer=_emulated),
}
