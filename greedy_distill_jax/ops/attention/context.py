"""Chunk attention over a mesh axis that splits the frames: only keys that another device sees travel.

Device d holds query chunks and key chunks [d n, (d + 1) n). The table says which foreign key chunks each device needs
(the window's halo, the sink); those and no others are sent, point to point, by ``ppermute``. Every device then attends
to [own chunks | received chunks] with the one schedule that covers all devices and a mask of its own. Nothing is
approximated, and gradients travel back the same way.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float

from greedy_distill_jax.errors import UserError
from greedy_distill_jax.ops.attention.api import chunk_attention
from greedy_distill_jax.ops.attention.schedule import Schedule


@dataclasses.dataclass(frozen=True)
class Exchange:
    """What travels and what every device then computes.

    Attributes:
      slots: received key chunks per device; a device that needs fewer gets zeros it does not see.
      rounds: (slot, pairs (source, destination), local chunk each device sends), one ``ppermute`` each.
      schedule: local table over [own | slots] that covers all devices.
      visible: bool [devices, local query chunks, own + slots], what of it is true on each device.
    """

    slots: int
    rounds: tuple[tuple[int, tuple[tuple[int, int], ...], tuple[int, ...]], ...]
    schedule: Schedule
    visible: np.ndarray

    @property
    def chunks_sent(self) -> int:
        """Key chunks that travel, all devices together."""
        return sum(len(pairs) for _, pairs, _ in self.rounds)


@functools.lru_cache(maxsize=64)
def plan(schedule: Schedule, devices: int) -> Exchange:
    """The exchange for a global ``schedule`` cut into ``devices`` equal runs of chunks.

    Raises:
      UserError: the chunks do not divide by the devices.
    """
    for name, count in (("query", schedule.num_q_chunks), ("key", schedule.num_k_chunks)):
        if count % devices:
            raise UserError(
                f"context parallelism: {count} {name} chunks do not divide by {devices} devices; choose a number of "
                f"frames that does, or fewer devices on this axis."
            )
    own_q, own_k = schedule.num_q_chunks // devices, schedule.num_k_chunks // devices
    rows = [schedule.table[d * own_q : (d + 1) * own_q] for d in range(devices)]
    foreign = [sorted({j for row in mine for j in row if j // own_k != d}) for d, mine in enumerate(rows)]
    slots = max(map(len, foreign))
    visible = np.zeros((devices, own_q, own_k + slots), bool)
    for d, mine in enumerate(rows):
        for i, row in enumerate(mine):
            for j in row:
                visible[d, i, j - d * own_k if j // own_k == d else own_k + foreign[d].index(j)] = True
    rounds = []
    for slot in range(slots):
        waiting = [(needed[slot], d) for d, needed in enumerate(foreign) if slot < len(needed)]
        while waiting:  # a device sends to one other at a time: the sink, which all need, takes several rounds
            sources, sent = {}, []
            for j, d in waiting:
                if j // own_k not in sources:
                    sources[j // own_k] = j % own_k
                    sent.append((j, d))
            waiting = [item for item in waiting if item not in sent]
            pairs = tuple((j // own_k, d) for j, d in sent)
            rounds.append((slot, pairs, tuple(sources.get(d, 0) for d in range(devices))))
    union = [np.flatnonzero(row).tolist() for row in visible.any(0)]
    local = Schedule.from_table(union, q_chunk=schedule.q_chunk, k_chunk=schedule.k_chunk, num_k_chunks=own_k + slots)
    return Exchange(slots, tuple(rounds), local, visible)


def context_attention(
    q_BLNK: Float[Array, "B L N K"],
    k_BSNK: Float[Array, "B S N K"],
    v_BSNK: Float[Array, "B S N K"],
    schedule: Schedule,
    axis_name: str,
    **options: Any,
) -> Float[Array, "B L N K"]:
    """``chunk_attention`` inside ``shard_map`` over a mesh axis that splits the chunks.

    Args:
      q_BLNK: this device's queries, L = its query chunks x ``schedule.q_chunk``.
      k_BSNK: this device's keys.
      v_BSNK: this device's values.
      schedule: the table of the whole video; its chunks divide by the size of the axis.
      axis_name: the mesh axis.
      **options: passed to ``chunk_attention`` (implementation, scale, derivative, ...).

    Returns:
      This device's output, the same numbers as one device would give.

    Raises:
      UserError: the chunks do not divide by the devices.
      ValueError: shapes that do not fit the schedule.
    """
    devices = jax.lax.axis_size(axis_name)
    exchange = plan(schedule, devices)
    me = jax.lax.axis_index(axis_name)
    if not exchange.slots:
        received = k_BSNK, v_BSNK
    else:
        received = (_receive(x, schedule.k_chunk, exchange, axis_name, me) for x in (k_BSNK, v_BSNK))
    visible_QS = None
    covered = exchange.schedule.chunk_mask()
    if not all((mine == covered).all() for mine in exchange.visible):
        visible_QS = jnp.asarray(exchange.visible)[me]
    return chunk_attention(q_BLNK, *received, exchange.schedule, visible_QS=visible_QS, **options)


def _receive(x_BSNK, tokens: int, exchange: Exchange, axis_name: str, me):
    """[own chunks | received chunks]; equal routes are one message."""
    chunks = rearrange(x_BSNK, "b (c s) n k -> b c s n k", s=tokens)
    routes: dict[tuple, list] = {}
    for slot, pairs, local in exchange.rounds:
        routes.setdefault(pairs, []).append((slot, local))
    slots = [0.0] * exchange.slots
    for pairs, messages in routes.items():
        index = jnp.asarray([local for _, local in messages]).T[me]
        arrived = jax.lax.ppermute(chunks[:, index], axis_name, pairs)  # zeros where nothing was sent
        for i, (slot, _) in enumerate(messages):
            slots[slot] = arrived[:, i] if isinstance(slots[slot], float) else slots[slot] + arrived[:, i]
    return rearrange(jnp.concatenate([chunks, jnp.stack(slots, 1)], axis=1), "b c s n k -> b (c s) n k")
