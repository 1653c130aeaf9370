"""The attention op at the shapes that the models have, ours next to cuDNN and PyTorch.

Two kinds of work. "stream": one chunk of queries against a cache of which everything is filled, forward only, as such,
and with the number of keys as a length, as streams run until their slots are full. "train": the tables of the parallel
form, forward and backward. TFLOP/s count unmasked pairs only, two matmuls forward and five backward. Every output, and
every gradient, is compared with dense attention in float32 over a part of the table. On a Hopper card the kernels'
block sizes are tried and the card's tuned table is written (``tune.py``).
"""

import dataclasses
import functools
import importlib.util
import itertools
import os
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from sizes import SIZES, Size

from device_items import ceilings, torch_attention, tune
from device_items.correctness import needs
from device_items.record import NotHere, Record
from device_items.timing import UNTUNED, error, median_ms
from greedy_distill_jax.config import read_settings
from greedy_distill_jax.models.students import patterns
from greedy_distill_jax.ops.attention import Pattern, chunk_attention
from greedy_distill_jax.ops.attention.backends import mosaic_gpu, reference
from greedy_distill_jax.ops.attention.backends.record import Call
from greedy_distill_jax.ops.attention.tuning import Blocks

HEADS = {"1.3B": 12, "14B": 40}  # of 128
BACKWARD = 3.5  # FLOPs of forward and backward over those of forward
NO_MASK, SLICES = "cuDNN, no mask", "ours (slices + cuDNN)"
SETS = 8  # of inputs for calls that are short, so that they are not all in the cache
CHECKED_ROWS = 6  # of what is computed densely
SEED = int.from_bytes(os.urandom(4), "little")  # which part of a table, and which head: another one in every run
OUTPUT, GRADIENT = {"float32": 2e-5, "bfloat16": 1e-2}, {"float32": 5e-5, "bfloat16": 2e-2}


@dataclasses.dataclass(frozen=True)
class Work:
    """One table at one number of heads; ``stream``: forward only, with slots that may be empty."""

    name: str
    table: Pattern
    heads: int
    dim: int
    dtype: str
    stream: bool

    @property
    def flops(self) -> float:
        """Of a forward pass."""
        return 4.0 * self.heads * self.dim * self.table.pairs

    def inputs(self, sets: int) -> list[list[jax.Array]]:
        """Sets of q, k, v and a cotangent."""
        q, k = self.table.q_tokens, self.table.k_tokens
        return [_draw(jax.random.key(n), q, k, self.heads, self.dim, self.dtype) for n in range(sets)]


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4, 5))
def _draw(key, q, k, heads, dim, dtype):
    keys = jax.random.split(key, 4)
    return [jax.random.normal(key, (1, n, heads, dim), jnp.dtype(dtype)) for key, n in zip(keys, (q, k, k, q))]


def works(size: Size) -> list[Work]:
    """What the configurations of this size run; at 1.3B the same frames with the heads of 14B as well."""
    etm_sdd, causal = (
        read_settings(size.config(name), imagine_runs=True).student_config for name in ("etm_sdd", "causal")
    )
    base = etm_sdd.base
    tokens = size.latent_shape[0] * size.latent_shape[1] // base.patch**2
    heads = HEADS if base.head_dim == 128 else {"tiny": base.num_heads}

    own, three, out = tokens * etm_sdd.chunk, tokens * causal.chunk, []
    chunks = size.frames // etm_sdd.chunk
    for label, count in heads.items():
        for name, layout, stream in (
            ("SDD", patterns.sdd_step(etm_sdd, own), True),
            ("ETM", patterns.etm_step(etm_sdd, own), True),
            ("causal", patterns.causal_step(causal, three), True),
            ("SDD", patterns.sdd_parallel(etm_sdd, chunks, own), False),
            ("ETM", patterns.etm_parallel(etm_sdd, chunks, own), False),
            ("causal", patterns.causal_parallel(causal, size.frames // causal.chunk, three), False),
        ):
            kind = "stream" if stream else "train"
            out.append(Work(f"{kind} {name} {label}", layout.pattern, count, base.head_dim, base.dtype, stream))
    return sorted(out, key=lambda w: (not w.stream, w.name.endswith("14B")))


def run(record: Record) -> None:
    """Streams, then training tables, then what is slow to compile or to run; the larger model last."""
    every = works(SIZES[record.data["size"]])
    ceiling = ceilings.matmul_flops(record, "float32" if jax.default_backend() == "cpu" else "bfloat16")

    def row(work, name, measure, needs):
        record.row(f"{work.name}: {name}", lambda: measure(work, ceiling), needs)

    def measure_kernels(works, **options):
        for work, blocks in itertools.product(works, tune.TRIED):
            attend = ours("mosaic_gpu", blocks)
            row(work, tune.label(blocks), functools.partial(by_jax, attend=attend, **options), 6)

    def measure_streams(works):
        for work in works:
            row(work, NO_MASK, functools.partial(by_jax, attend=cudnn), 5)
            row(work, "cuDNN, key lengths", functools.partial(by_jax, attend=cudnn_lengths, partly=True), 5)
            row(work, "ours", functools.partial(by_jax, attend=ours(None)), 4)
            row(work, "ours, key lengths", functools.partial(by_jax, attend=filling), 4)
            row(work, "torch SDPA", functools.partial(by_torch, make=torch_attention.sdpa), 4)

    def measure_tables(works):
        for work in works:
            row(work, SLICES, functools.partial(by_jax, attend=ours("cudnn"), sets=1), 8)
            row(work, "torch SDPA on slices", functools.partial(by_torch, make=torch_attention.slices), 6)

    streams, tables = ([w for w in every if w.stream == kind] for kind in (True, False))
    small = len(every) // len({w.heads for w in every}) // 2  # of each kind, those of the smallest model
    measure_streams(streams[:small])
    measure_kernels(streams[:small])
    measure_tables(tables[:small])
    measure_kernels(tables[:small], sets=1)
    for work in [w for w in tables if "ETM" in w.name][:1]:
        row(work, "cuDNN, every pair", functools.partial(by_jax, attend=cudnn, sets=1, whole=True), 6)
        row(work, "ours, XLA scan", functools.partial(by_jax, attend=ours("xla"), sets=1), 10)
        row(work, "torch FlexAttention", functools.partial(by_torch, make=torch_attention.flex), 25)
        row(work, "tokamax", functools.partial(by_jax, attend=tokamax, sets=1), 10)
    for work in streams[:small]:
        row(work, "ours, XLA scan", functools.partial(by_jax, attend=ours("xla"), sets=1), 6)
    measure_streams(streams[small:])
    measure_tables(tables[small:])
    target = mosaic_gpu.target_of(jax.devices()[0].device_kind)
    if target is not None:
        peers = {"stream": NO_MASK, "train": SLICES}
        tune.write(
            record.path.parent, target, record.data, record.data["rows"], streams[:small] + tables[:small], peers
        )


# --- ways to attend: attend(work, q, k, v) ------------------------------------------------------------------------


def cudnn(work: Work, q, k, v):
    """cuDNN's fused attention of everything to everything."""
    needs("cudnn", q, work.table)
    return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")


def cudnn_lengths(work: Work, q, k, v, length=None):
    """The same, told how many keys count."""
    needs("cudnn", q, work.table)
    length = jnp.int32(k.shape[1]) if length is None else length
    return jax.nn.dot_product_attention(q, k, v, key_value_seq_lengths=length[None], implementation="cudnn")


def filling(work: Work, q, k, v):
    """What streams run while slots are empty, of which here none is."""
    lengths = jnp.full((work.table.num_q_chunks,), work.table.num_k_chunks, jnp.int32)
    return chunk_attention(q, k, v, work.table, lengths_Q=jax.lax.optimization_barrier(lengths))


def ours(implementation: str | None, blocks: Blocks | None = None) -> Callable:
    """The op by one implementation, None for the best, with block sizes of its own or the tuned ones."""

    def attend(work: Work, q, k, v):
        if implementation is not None:
            needs(implementation, q, work.table)
        return chunk_attention(q, k, v, work.table, implementation=implementation, blocks=blocks)

    return attend


def tokamax(work: Work, q, k, v):
    """Its attention with the table as a mask."""
    if importlib.util.find_spec("tokamax") is None:
        raise NotHere("tokamax is not installed")
    import tokamax as library

    return library.dot_product_attention(q, k, v, mask=jnp.asarray(work.table.dense_mask())[None, None])


# --- measuring ----------------------------------------------------------------------------------------------------


def figures(work: Work, flops: float, ceiling: float, forward: float, both: float | None) -> dict[str, float]:
    """Milliseconds, TFLOP/s and shares of the ceiling."""
    out = {"forward ms": forward, "TFLOP/s": 1e-9 * flops / forward, "share": 1e3 * flops / forward / ceiling}
    if both is not None:
        out |= {
            "forward + backward ms": both,
            "both TFLOP/s": 1e-9 * BACKWARD * flops / both,
            "both share": 1e3 * BACKWARD * flops / both / ceiling,
        }
    return out


def by_jax(work: Work, ceiling: float, *, attend, sets: int = SETS, whole: bool = False, partly: bool = False) -> dict:
    """One way in jax; ``whole``: it computes every pair of the table; ``partly``: check it with fewer keys as well."""
    if whole:
        table = work.table
        full = Pattern.full(table.num_q_chunks, table.q_chunk, table.num_k_chunks, table.k_chunk)
        work = dataclasses.replace(work, table=full)
    inputs = work.inputs(sets)
    call = jax.jit(functools.partial(attend, work))  # one function for all sets: kernels are lowered once

    def gradients(q, k, v, g):
        out, pull = jax.vjp(call, q, k, v)
        return out, *pull(g)

    forward = jax.jit(lambda sets: [call(*s[:3]) for s in sets])
    both = jax.jit(lambda sets: [gradients(*s) for s in sets])
    found = (forward(inputs)[0],) if work.stream else both(inputs)[0]
    checks = compared(work, inputs[0], found)
    if partly:
        q, k, v = (_head(x) for x in inputs[0][:3])
        length = 3 * k.shape[1] // 4
        got = call(*inputs[0][:3], jnp.int32(length))
        part = Pattern(q.shape[1], length, 1, ((0,),))
        expected = _dense(q, k[:, :length], v[:, :length], part)
        checks["output, three quarters of the keys"] = (error(_head(got), expected), OUTPUT[work.dtype])
    ms, runs = median_ms(lambda: forward(inputs), seconds=1.0)
    twice = None if work.stream else median_ms(lambda: both(inputs), seconds=1.5)[0] / sets
    return _row(work, ceiling, ms / sets, twice, checks, runs * sets)


def by_torch(work: Work, ceiling: float, *, make) -> dict:
    """One way in PyTorch."""
    inputs = work.inputs(1)[0]
    forward, both = make(work.table, inputs, backward=not work.stream)
    found = [torch_attention.to_jax(x) for x in ((forward(),) if work.stream else both())]
    checks = compared(work, inputs, found)
    ms, runs = median_ms(torch_attention.synchronised(forward), seconds=1.0)
    twice = None if work.stream else median_ms(torch_attention.synchronised(both), seconds=1.5)[0]
    return _row(work, ceiling, ms, twice, checks, runs)


def _row(work: Work, ceiling: float, forward: float, both: float | None, checks: dict, runs: int) -> dict:
    table = work.table
    return {
        "figures": figures(work, work.flops, ceiling, forward, both),
        "checks": checks,
        "runs": runs,
        "queries": [1, table.q_tokens, work.heads, work.dim],
        "keys": [1, table.k_tokens, work.heads, work.dim],
        "dtype": work.dtype,
        "pairs": table.pairs,
        "flops_forward": work.flops,
    }


@functools.partial(jax.jit, static_argnums=3, compiler_options=UNTUNED)
def _dense(q, k, v, table: Pattern):
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    with jax.default_matmul_precision("highest"):
        return reference.attend(q, k, v, None, Call(table, q.shape[-1] ** -0.5))


@functools.partial(jax.jit, static_argnums=4, compiler_options=UNTUNED)
def _dense_gradients(q, k, v, g, table: Pattern):
    with jax.default_matmul_precision("highest"):
        call = Call(table, q.shape[-1] ** -0.5)
        q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
        out, pull = jax.vjp(lambda q, k, v: reference.attend(q, k, v, None, call), q, k, v)
        return out, *pull(g.astype(jnp.float32))


def _head(x):
    """One head of [B, L, N, K]."""
    head = SEED % x.shape[2]
    return x[:, :, head : head + 1]


def compared(work: Work, inputs, found) -> dict[str, tuple[float, float]]:
    """Errors relative to dense float32 attention, one head of it.

    Of a stream the whole output. Of a table one key chunk is drawn; all query chunks that see it are computed densely:
    their outputs and dq, and dk and dv of that chunk, are then complete.
    """
    table, (q, k, v, g) = work.table, map(_head, inputs)
    if work.stream:
        return {"output": (error(_head(found[0]), _dense(q, k, v, table)), OUTPUT[work.dtype])}
    key = int(np.random.default_rng(SEED).integers(table.num_k_chunks))
    rows = [i for i, row in enumerate(table.table) if key in row][:CHECKED_ROWS]
    complete = len(rows) == sum(key in row for row in table.table)
    keys = sorted({j for i in rows for j in table.table[i]})
    part = Pattern.from_table(
        [[keys.index(j) for j in table.table[i]] for i in rows],
        q_chunk=table.q_chunk,
        k_chunk=table.k_chunk,
        num_k_chunks=len(keys),
    )

    def take(x, chunks, size):
        return jnp.concatenate([x[:, c * size : (c + 1) * size] for c in chunks], axis=1)

    mine = [take(x, rows, table.q_chunk) for x in (q, g)]
    exact = _dense_gradients(mine[0], *(take(x, keys, table.k_chunk) for x in (k, v)), mine[1], part)
    checks = {}
    for name, whole, expected in zip(("output", "dq", "dk", "dv"), found, exact):
        of_keys = name in ("dk", "dv")
        if of_keys and not complete:
            continue
        place, size = ([key], table.k_chunk) if of_keys else (rows, table.q_chunk)
        if of_keys:
            expected = take(expected, [keys.index(key)], size)
        limit = (OUTPUT if name == "output" else GRADIENT)[work.dtype]
        checks[name] = (error(take(_head(whole), place, size), expected), limit)
    return checks
