"""Chunk attention for NVIDIA Hopper: forward, dq, and dk with dv, as Pallas kernels (Mosaic GPU; ``hopper/``).

Only the listed chunks are visited, in place: keys are not gathered, and no block of a pair outside the table is
computed. Softmax is in float32; probabilities are rounded to the dtype of q before they meet the values.

A card's tuned table (``tuned/h100.json``, ``tuned/h200.json``), which a measurement on that card writes, says for which
chunks the kernels beat cuDNN. Elsewhere they run where they are asked for by name.

Mosaic GPU and the kernels are imported where they are used: every command imports this file, few have such a card.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from greedy_distill_jax.errors import UserError
from greedy_distill_jax.ops.attention import tuning
from greedy_distill_jax.ops.attention.backends.hopper import tables
from greedy_distill_jax.ops.attention.backends.record import Backend, Call, Kernel, Request
from greedy_distill_jax.ops.attention.pattern import Pattern
from greedy_distill_jax.ops.attention.tuning import Blocks

KERNELS = {
    "forward_kernel": Kernel(2, "forward"),
    "dq_kernel": Kernel(3, "dq"),
    "dkv_kernel": Kernel(4, "dkv", by_key=True),
}
HEAD_DIMS = (64, 128)
MULTIPLE = 8  # tokens: blocks begin at rows of 8 in memory
TILES, MULTIPLE_OF_BLOCK = (128, 192), 16  # tokens: of two or three warpgroups, and what a product sums over
CARDS = {"h100": "NVIDIA H100", "h200": "NVIDIA H200"}  # targets, and how jax's names of their cards begin
BLOCKS = Blocks(forward=(128, 128), dq=(128, 64), dkv=(64, 128))  # where no table has others


def why_not(request: Request) -> str | None:
    """See ``record.Backend``."""
    target = target_of(request.kind)
    if not request.interpret and (request.platform != "gpu" or target is None):
        return f"it needs an NVIDIA H100 or H200 and this is {request.kind} (interpret=True emulates it)"
    from jax.experimental.pallas import mosaic_gpu as plgpu

    if not hasattr(plgpu, "InterpretGPUParams"):
        return f"this is jax {jax.__version__}; the kernels need 0.11.2 or later"
    if request.head_dim not in HEAD_DIMS:
        return f"the head dim is {request.head_dim}, not one of {HEAD_DIMS}"
    if request.dtype not in (jnp.bfloat16, jnp.float16):
        return f"the dtype is {request.dtype}, not bfloat16 or float16"
    pattern = request.pattern
    if pattern.q_chunk % MULTIPLE or pattern.k_chunk % MULTIPLE:
        return f"chunks have {pattern.q_chunk} and {pattern.k_chunk} tokens, not multiples of {MULTIPLE}"
    if not request.named:
        name = key(pattern, request.head_dim, str(request.dtype))
        if name not in tuning.record(target).get("fastest", ()):
            return f"tuned/{target}.json does not say that it is the fastest for {name}"
    return None


def target_of(kind: str) -> str | None:
    """The target that a device is, by jax's name of its kind; None if it is none."""
    return next((target for target, name in CARDS.items() if kind.startswith(name)), None)


def key(pattern: Pattern, dim: int, dtype: str) -> str:
    """The name of a pattern's entry in a tuned table: what is one chunk to the kernels counts as one."""
    merged = pattern.merged()
    return tuning.key(merged.q_chunk, merged.k_chunk, dim, dtype)


def blocks(kind: str, pattern: Pattern, dim: int, dtype: str) -> Blocks:
    """See ``record.Backend``."""
    return tuning.tuned(target_of(kind) or "", key(pattern, dim, dtype)) or BLOCKS


def attend(q_BLNK, k_BSNK, v_BSNK, lengths_Q, call: Call):
    """See ``record.Backend``."""
    return forward(q_BLNK, k_BSNK, v_BSNK, lengths_Q, call)[0]


def forward(q_BLNK, k_BSNK, v_BSNK, lengths_Q, call: Call):
    """(output, what ``backward`` needs)."""
    from greedy_distill_jax.ops.attention.backends.hopper import forward as kernels

    launch, visits, plan = _launch(call, q_BLNK, lengths_Q, keys=False, pair=call.blocks.forward)
    out, lse = kernels.forward(q_BLNK, k_BSNK, v_BSNK, launch, visits, plan, call.scale)
    return out, (q_BLNK, k_BSNK, v_BSNK, lengths_Q, out, lse)


def backward(residual, g_BLNK, call: Call):
    """(dq, dk, dv)."""
    from greedy_distill_jax.ops.attention.backends.hopper import backward as kernels

    q_BLNK, k_BSNK, v_BSNK, lengths_Q, out_BLNK, lse_BNL = residual
    delta_BNL = jnp.einsum("blnk,blnk->bnl", out_BLNK, g_BLNK, preferred_element_type=jnp.float32)
    queries, keys, rows = (q_BLNK, g_BLNK.astype(q_BLNK.dtype)), (k_BSNK, v_BSNK), (lse_BNL, delta_BNL)
    by_query = _launch(call, q_BLNK, lengths_Q, keys=False, pair=call.blocks.dq, whole=True)
    by_key = _launch(call, q_BLNK, lengths_Q, keys=True, pair=call.blocks.dkv, whole=True)
    dq = kernels.dq((*queries, *keys), rows, *by_query, call.scale)
    return dq, *kernels.dkv((*keys, *queries), rows, *by_key, call.scale)


def _launch(call: Call, q_BLNK, lengths_Q, *, keys: bool, pair: tuple[int, int], whole: bool = False):
    """(shapes, visits, plan) of one kernel; ``keys``: they are the outer side; ``whole``: no tile is split.

    Raises:
      UserError: blocks that the kernels do not have, or a scale that is not positive.
    """
    from jax.experimental.pallas import mosaic_gpu as plgpu

    from greedy_distill_jax.ops.attention.backends.hopper.parts import Launch

    if not call.scale > 0:
        raise UserError(f"chunk_attention: the kernels need a positive scale, got {call.scale}.", field="scale")
    pattern = call.pattern.merged() if lengths_Q is None else call.pattern
    rows = tables.by_key(pattern) if keys else tables.by_query(pattern)
    counts = None if lengths_Q is None else tables.visible(pattern, rows, lengths_Q, keys=keys)
    sides = (pattern.q_chunk, pattern.num_q_chunks), (pattern.k_chunk, pattern.num_k_chunks)
    ((outer, _), (inner, inner_chunks)), (tile, block) = (two[:: -1 if keys else 1] for two in (sides, tuple(pair)))
    if tile not in TILES or block % MULTIPLE_OF_BLOCK:
        raise UserError(
            f"chunk_attention: {'dk and dv' if keys else 'queries'} with blocks of {pair[0]} queries x {pair[1]} keys; "
            f"tiles are {' or '.join(map(str, TILES))} tokens and what passes by a multiple of {MULTIPLE_OF_BLOCK}.",
            field="blocks",
        )
    visits, work = tables.visits(rows, inner, block, counts)
    batch, _, heads, dim = q_BLNK.shape
    interpret = plgpu.InterpretGPUParams() if call.interpret is True else call.interpret or None
    cut = (1, inner * inner_chunks) if counts is None else (inner_chunks, inner)
    launch = Launch(batch, heads, dim, q_BLNK.dtype, outer, len(rows), *cut, tile, block, interpret)
    plan = tables.schedule(work, batch, heads, launch.tiles, may_split=not whole)
    return launch, visits, plan


class Estimate(NamedTuple):
    """What can be said of a kernel without a card.

    Attributes:
      shared_bytes: of shared memory for a thread block, of which an H100 has 227 KiB.
      parts: whether tiles are split.
      busy: ``tables.busy``.
      useful: pairs of the table over those in the visited blocks.
    """

    shared_bytes: int
    parts: bool
    busy: float
    useful: float

    def __str__(self) -> str:
        tiles = "tiles in parts" if self.parts else "whole tiles"
        share = f"busy {self.busy:.0%} x useful {self.useful:.0%} = {self.busy * self.useful:.0%}"
        return f"{self.shared_bytes / 1024:.0f} KiB shared, {tiles}, {share}"


def estimates(pattern: Pattern, q_BLNK, pairs: Blocks) -> dict[str, Estimate]:
    """{kernel: its estimate}; busy x useful is the share of the tensor cores' time that a perfect loop would use."""
    call, found = Call(pattern, 1.0), {}
    for name, kernel in KERNELS.items():
        first = kernel.blocks == "forward"
        options = dict(keys=kernel.by_key, pair=getattr(pairs, kernel.blocks), whole=not first)
        launch, visits, plan = _launch(call, q_BLNK, None, **options)
        computed = int(visits.total.sum()) * launch.tiles * launch.tile * launch.block
        shared = launch.shared_bytes(1 if first else 2)
        found[name] = Estimate(shared, plan.split, tables.busy(plan), pattern.pairs / max(computed, 1))
    return found


BACKEND = Backend(
    "mosaic_gpu",
    why_not,
    attend,
    forward,
    backward,
    partitionable=False,
    backward_flops=3.5,  # seven matmuls over two
    blocks=blocks,
    kernels=KERNELS,
    estimates=estimates,
)


def preferred() -> Backend:
    """The backend as one that is taken wherever it can run, whatever a tuned table says: to measure with."""
    return dataclasses.replace(BACKEND, why_not=lambda request: why_not(request._replace(named=True)))
