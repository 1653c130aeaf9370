"""Chunk attention for TPU: forward, dq, and dk with dv, as Pallas kernels over the block pairs of the pattern.

The grid is (batch, head, visit). The visit lists (``Pattern.block_lists``) are prefetched scalars that choose the
blocks to load, so a block pair outside the table costs nothing, not even a grid step. Logits are kept transposed,
[keys, queries]: softmax statistics are then rows that broadcast along sublanes, and log-sum-exp needs no padding.

Blocks are parts of chunks. Where they divide a chunk, as 520 and 1560 divide a frame of 1560 tokens, nothing is padded
or masked; elsewhere the last block of a chunk hangs over its end and only there tokens are masked. A head dim of 128
is read in place from [B, L, N K]; one of 64 is transposed to [B N, L, K] first: a block has at least 128 lanes.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from greedy_distill_jax.ops.attention import tuning
from greedy_distill_jax.ops.attention.backends.record import Backend, Call, Kernel, Request
from greedy_distill_jax.ops.attention.pattern import VOID, BlockList

KERNELS = {
    "forward_kernel": Kernel(2, "forward"),
    "dq_kernel": Kernel(3, "dq"),
    "dkv_kernel": Kernel(4, "dkv", by_key=True),
}
HEAD_DIMS = (64, 128)
LANES = 128
FIRST, LAST, LIVE = 1, 2, 4  # bits of a visit's code
NEVER = -1e30
LOG2E = math.log2(math.e)
VMEM_LIMIT = 64 << 20  # the default scope of v5e and v5p, 16 MB, is too small for a block pair of whole frames


def why_not(request: Request) -> str | None:
    """See ``record.Backend``."""
    if request.platform != "tpu" and not request.interpret:
        return f"it needs a TPU and this is {request.platform} (interpret=True emulates it)"
    if request.head_dim not in HEAD_DIMS:
        return f"the head dim is {request.head_dim}, not one of {HEAD_DIMS}"
    if request.dtype not in (jnp.float32, jnp.bfloat16):
        return f"the dtype is {request.dtype}, not float32 or bfloat16"
    return None


def attend(q_BLNK, k_BSNK, v_BSNK, lengths_Q, call: Call):
    """See ``record.Backend``."""
    return forward(q_BLNK, k_BSNK, v_BSNK, lengths_Q, call)[0]


def forward(q_BLNK, k_BSNK, v_BSNK, lengths_Q, call: Call):
    """(output, what ``backward`` needs)."""
    blocks = call.blocks.forward
    launch = _Launch(call, q_BLNK.shape, *blocks)
    by_query, _ = call.pattern.block_lists(*blocks)
    q, k, v = launch.view_q(q_BLNK), launch.view_k(k_BSNK), launch.view_k(v_BSNK)
    statistics = pltpu.VMEM((1, launch.block_q), jnp.float32)
    out, lse = launch.run(
        _forward_kernel,
        by_query,
        lengths_Q,
        ("q", "k", "k"),
        (q, k, v),
        ("q", "row"),
        (like(q, q.shape, v.dtype), like(q, launch.row_shape, jnp.float32)),
        [statistics, statistics, pltpu.VMEM((launch.dim, launch.block_q), jnp.float32)],
    )
    out = launch.unview(out, q_BLNK.shape)
    return out, (q_BLNK, k_BSNK, v_BSNK, lengths_Q, out, launch.from_rows(lse))


def backward(residual, g_BLNK, call: Call):
    """(dq, dk, dv)."""
    q_BLNK, k_BSNK, v_BSNK, lengths_Q, out_BLNK, lse_BNQ = residual
    delta_BNQ = jnp.einsum("blnk,blnk->bnl", out_BLNK, g_BLNK, preferred_element_type=jnp.float32)

    def setup(block_q, block_k):
        launch = _Launch(call, q_BLNK.shape, block_q, block_k)
        views = launch.view_q(q_BLNK), launch.view_k(k_BSNK), launch.view_k(v_BSNK), launch.view_q(g_BLNK)
        return launch, views, (*views, launch.to_rows(lse_BNQ), launch.to_rows(delta_BNQ))

    specs = ("q", "k", "k", "q", "row", "row")
    launch, (q, *_), inputs = setup(*call.blocks.dq)
    accumulator = [pltpu.VMEM((launch.dim, launch.block_q), jnp.float32)]
    by_query, _ = call.pattern.block_lists(*call.blocks.dq)
    shapes = (like(q, q.shape, q.dtype),)
    (dq,) = launch.run(_dq_kernel, by_query, lengths_Q, specs, inputs, ("q",), shapes, accumulator)
    dq = launch.unview(dq, q_BLNK.shape)

    launch, (_, k, v, _), inputs = setup(*call.blocks.dkv)
    accumulators = [pltpu.VMEM((launch.block_k, launch.dim), jnp.float32)] * 2
    _, by_key = call.pattern.block_lists(*call.blocks.dkv)
    shapes = like(k, k.shape, k.dtype), like(v, v.shape, v.dtype)
    dk, dv = launch.run(_dkv_kernel, by_key, lengths_Q, specs, inputs, ("k", "k"), shapes, accumulators)
    return dq, launch.unview(dk, k_BSNK.shape), launch.unview(dv, v_BSNK.shape)


def like(x, shape, dtype):
    """Result type varying over the same mesh axes as ``x`` (inside ``shard_map``)."""
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(x).manual_axis_type)


class _Launch:
    """Shapes, views and block specs that the three kernels share."""

    def __init__(self, call: Call, shape, block_q: int, block_k: int):
        self.pattern, self.scale, self.interpret = call.pattern, call.scale, call.interpret
        self.batch, _, self.heads, self.dim = shape
        self.block_q, self.block_k = block_q, block_k
        self.per_q, self.per_k = pl.cdiv(self.pattern.q_chunk, block_q), pl.cdiv(self.pattern.k_chunk, block_k)
        self.in_place = self.dim == LANES

    @property
    def grid(self) -> tuple[int, int]:
        """(rows of the views, heads side by side in their lanes)."""
        return (self.batch, self.heads) if self.in_place else (self.batch * self.heads, 1)

    @property
    def row_shape(self) -> tuple[int, ...]:
        """[rows, heads in the lanes, query blocks, 1, tokens of a block] of log-sum-exp and delta."""
        return (*self.grid, self.pattern.num_q_chunks * self.per_q, 1, self.block_q)

    def _view(self, x_BLNK, tokens: int):
        batch, length, heads, dim = x_BLNK.shape
        if not self.in_place:
            return jnp.swapaxes(x_BLNK, 1, 2).reshape(batch * heads, length // tokens, tokens, dim)
        return x_BLNK.reshape(batch, length // tokens, tokens, heads * dim)

    def view_q(self, x_BLNK):
        """Queries as [rows, chunks, tokens, lanes]."""
        return self._view(x_BLNK, self.pattern.q_chunk)

    def view_k(self, x_BSNK):
        """Keys as [rows, chunks, tokens, lanes]."""
        return self._view(x_BSNK, self.pattern.k_chunk)

    def unview(self, x, shape):
        """A view back to [B, L, N, K]."""
        if self.in_place:
            return x.reshape(shape)
        batch, length, heads, dim = shape
        return jnp.swapaxes(x.reshape(batch, heads, length, dim), 1, 2)

    def to_rows(self, x_BNL):
        """[B, N, L] -> ``row_shape``; what hangs over the end of a chunk is 0."""
        x = x_BNL.reshape(*x_BNL.shape[:2], self.pattern.num_q_chunks, self.pattern.q_chunk)
        x = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, self.per_q * self.block_q - self.pattern.q_chunk)))
        return x.reshape(self.row_shape)

    def from_rows(self, x):
        """``row_shape`` -> [B, N, L]."""
        x = x.reshape(self.batch, self.heads, self.pattern.num_q_chunks, self.per_q * self.block_q)
        return x[..., : self.pattern.q_chunk].reshape(self.batch, self.heads, -1)

    def _visits(self, pairs: BlockList, lengths_Q, by_key: bool):
        counts = pairs.inner != VOID
        inner = np.where(counts, pairs.inner, 0)
        first, last = pairs.edges
        code = (first * FIRST + last * LAST).astype(np.int32)
        live = counts
        if lengths_Q is not None:
            q, k = (inner, pairs.outer) if by_key else (pairs.outer, inner)
            chunks = q // self.per_q
            live = (jnp.asarray(self.pattern.ranks()[chunks, k // self.per_k]) < lengths_Q[chunks]) & counts
        return jnp.asarray(pairs.outer), jnp.asarray(inner), jnp.asarray(code) + LIVE * jnp.asarray(live, jnp.int32)

    def _spec(self, kind: str, by_key: bool):
        """Block spec of "q" tokens, "k" tokens or a "row" of statistics of the queries."""
        per, block = (self.per_k, self.block_k) if kind == "k" else (self.per_q, self.block_q)
        use_outer = (kind == "k") == by_key

        def tokens(row, head, visit, outer, inner, code):
            index = (outer if use_outer else inner)[visit]
            return row, jax.lax.div(index, np.int32(per)), jax.lax.rem(index, np.int32(per)), head

        def statistics(row, head, visit, outer, inner, code):
            return row, head, (outer if use_outer else inner)[visit], 0, 0

        if kind == "row":
            return pl.BlockSpec((None, None, None, 1, block), statistics)
        return pl.BlockSpec((None, None, block, self.dim), tokens)

    def run(self, kernel, pairs, lengths_Q, specs, inputs, out_specs, out_shape, scratch):
        """Calls ``kernel`` once per visit."""
        name = kernel.__name__.strip("_")
        kind, by_key = KERNELS[name], KERNELS[name].by_key
        visits = self._visits(pairs, lengths_Q, by_key)
        bound = functools.partial(
            kernel,
            scale=self.scale,
            tail_q=_Tail(self.pattern.q_chunk, self.per_q, self.block_q),
            tail_k=_Tail(self.pattern.k_chunk, self.per_k, self.block_k),
        )
        work = self.batch * self.heads * pairs.pairs * self.block_q * self.block_k
        return pl.pallas_call(
            bound,
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=len(visits),
                grid=(*self.grid, len(pairs.outer)),
                in_specs=[self._spec(kind, by_key) for kind in specs],
                out_specs=[self._spec(kind, by_key) for kind in out_specs],
                scratch_shapes=scratch,
            ),
            out_shape=list(out_shape),
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT
            ),
            cost_estimate=pl.CostEstimate(
                flops=2 * kind.matmuls * work * self.dim,
                transcendentals=work,
                bytes_accessed=sum(x.size * x.dtype.itemsize for x in (*inputs, *out_shape)),
            ),
            interpret=self.interpret,
            name=name,
        )(*visits, *inputs)


class _Tail:
    """The tokens of a chunk's last block that hang over its end."""

    def __init__(self, chunk: int, per_chunk: int, block: int):
        self.exists = per_chunk * block != chunk
        self.chunk, self.per_chunk, self.block = chunk, per_chunk, block

    def keep(self, index, shape, axis: int):
        """bool ``shape``: whether the token along ``axis`` of block ``index`` lies in its chunk."""
        start = jax.lax.rem(index, np.int32(self.per_chunk)) * self.block
        return jax.lax.broadcasted_iota(jnp.int32, shape, axis) + start < self.chunk

    def clean(self, x, index):
        """Zeros in the rows that do not exist: what lies there may be NaN, and 0 x NaN would spread."""
        return jnp.where(self.keep(index, x.shape, 0), x, jnp.zeros_like(x)) if self.exists else x


def _dot(a, b, contract_a: int, contract_b: int):
    return jax.lax.dot_general(a, b, (((contract_a,), (contract_b,)), ((), ())), preferred_element_type=jnp.float32)


def _visit(outer_ref, inner_ref, code_ref):
    visit = pl.program_id(2)
    return outer_ref[visit], inner_ref[visit], code_ref[visit]


def _forward_kernel(
    outer_ref,
    inner_ref,
    code_ref,
    q_ref,
    k_ref,
    v_ref,
    out_ref,
    lse_ref,
    peak_ref,
    total_ref,
    acc_ref,
    *,
    scale,
    tail_q,
    tail_k,
):
    _, j, code = _visit(outer_ref, inner_ref, code_ref)

    @pl.when(code & FIRST != 0)
    def _():
        start_softmax(peak_ref, total_ref, acc_ref)

    @pl.when(code & LIVE != 0)
    def _():
        keep = tail_k.keep(j, (k_ref.shape[0], q_ref.shape[0]), 0) if tail_k.exists else None
        add_keys(q_ref[...], k_ref[...], tail_k.clean(v_ref[...], j), keep, scale, peak_ref, total_ref, acc_ref)

    @pl.when(code & LAST != 0)
    def _():
        finish_softmax(out_ref, lse_ref, peak_ref, total_ref, acc_ref)


def start_softmax(peak_ref, total_ref, acc_ref):
    """Empty statistics of the online softmax: peak and total [1, queries], weighted values [K, queries]."""
    peak_ref[...] = jnp.full(peak_ref.shape, NEVER, jnp.float32)
    total_ref[...] = jnp.zeros(total_ref.shape, jnp.float32)
    acc_ref[...] = jnp.zeros(acc_ref.shape, jnp.float32)


def add_keys(q, k, v, keep, scale: float, peak_ref, total_ref, acc_ref):
    """Adds one key block to the statistics; ``keep`` masks logits [keys, queries], None keeps all."""
    z = _dot(k, q, 1, 1) * (scale * LOG2E)  # [keys, queries], in powers of 2
    if keep is not None:
        z = jnp.where(keep, z, NEVER)
    old = peak_ref[...]
    peak = jnp.maximum(old, jnp.max(z, axis=0, keepdims=True))
    shrink, p = jnp.exp2(old - peak), jnp.exp2(z - peak)
    peak_ref[...] = peak
    total_ref[...] = total_ref[...] * shrink + jnp.sum(p, axis=0, keepdims=True)
    acc_ref[...] = acc_ref[...] * shrink + _dot(v, p.astype(v.dtype), 0, 0)


def finish_softmax(out_ref, lse_ref, peak_ref, total_ref, acc_ref):
    """Writes the output, zeros where no key was added, and the log-sum-exp."""
    total = jnp.where(total_ref[...] > 0, total_ref[...], 1.0)
    out_ref[...] = (acc_ref[...] / total).T.astype(out_ref.dtype)
    lse_ref[...] = peak_ref[...] / LOG2E + jnp.log(total)


def _probabilities(q, k, v, g, lse, delta, i, j, scale, tail_q, tail_k):
    """(p, ds), both [keys, queries] float32; ds lacks the factor ``scale``."""
    p = jnp.exp2(_dot(k, q, 1, 1) * (scale * LOG2E) - lse * LOG2E)
    ds = p * (_dot(v, g, 1, 1) - delta)
    for tail, index, axis in ((tail_k, j, 0), (tail_q, i, 1)):
        if tail.exists:
            keep = tail.keep(index, p.shape, axis)
            p, ds = jnp.where(keep, p, 0.0), jnp.where(keep, ds, 0.0)
    return p, ds


def _dq_kernel(
    outer_ref,
    inner_ref,
    code_ref,
    q_ref,
    k_ref,
    v_ref,
    g_ref,
    lse_ref,
    delta_ref,
    dq_ref,
    acc_ref,
    *,
    scale,
    tail_q,
    tail_k,
):
    i, j, code = _visit(outer_ref, inner_ref, code_ref)

    @pl.when(code & FIRST != 0)
    def _():
        acc_ref[...] = jnp.zeros(acc_ref.shape, jnp.float32)

    @pl.when(code & LIVE != 0)
    def _():
        k = tail_k.clean(k_ref[...], j)
        _, ds = _probabilities(
            q_ref[...], k, v_ref[...], g_ref[...], lse_ref[...], delta_ref[...], i, j, scale, tail_q, tail_k
        )
        acc_ref[...] += _dot(k, ds.astype(k.dtype), 0, 0)

    @pl.when(code & LAST != 0)
    def _():
        dq_ref[...] = (acc_ref[...] * scale).T.astype(dq_ref.dtype)


def _dkv_kernel(
    outer_ref,
    inner_ref,
    code_ref,
    q_ref,
    k_ref,
    v_ref,
    g_ref,
    lse_ref,
    delta_ref,
    dk_ref,
    dv_ref,
    acc_k,
    acc_v,
    *,
    scale,
    tail_q,
    tail_k,
):
    j, i, code = _visit(outer_ref, inner_ref, code_ref)

    @pl.when(code & FIRST != 0)
    def _():
        acc_k[...] = jnp.zeros(acc_k.shape, jnp.float32)
        acc_v[...] = jnp.zeros(acc_v.shape, jnp.float32)

    @pl.when(code & LIVE != 0)
    def _():
        q, g = tail_q.clean(q_ref[...], i), tail_q.clean(g_ref[...], i)
        p, ds = _probabilities(q, k_ref[...], v_ref[...], g, lse_ref[...], delta_ref[...], i, j, scale, tail_q, tail_k)
        acc_v[...] += _dot(p.astype(g.dtype), g, 1, 0)
        acc_k[...] += _dot(ds.astype(q.dtype), q, 1, 0)

    @pl.when(code & LAST != 0)
    def _():
        dk_ref[...] = (acc_k[...] * scale).astype(dk_ref.dtype)
        dv_ref[...] = acc_v[...].astype(dv_ref.dtype)


# Logits and their gradient are made once for the queries and once for the keys: seven matmuls for two.
BACKEND = Backend(
    "mosaic_tpu",
    why_not,
    attend,
    forward,
    backward,
    partitionable=False,
    backward_flops=3.5,
    blocks=lambda kind, pattern, dim, dtype: tuning.choose(kind, pattern.q_chunk, pattern.k_chunk, dim, dtype),
    kernels=KERNELS,
)
