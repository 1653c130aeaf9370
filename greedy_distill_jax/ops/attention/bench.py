"""Times ``chunk_attention`` against its peers; the command is ``python benchmarks/attention.py``.

On CPU a time is the process's CPU time in one pinned thread, on an accelerator the time until the result is ready. All
peers are timed in one process; the median of ``REPEATS`` runs after a first one counts.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from greedy_distill_jax.ops.attention import backends, select
from greedy_distill_jax.ops.attention.api import chunk_attention
from greedy_distill_jax.ops.attention.arg_specs import Spec

REPEATS = 3
# A peer makes of (spec, q, k, v, g as numpy) a function (backward: bool) -> callable that blocks until it is done.
Peer = Callable[..., Callable[[bool], Callable[[], Any]]]


def arrays(spec: Spec, seed: int = 0) -> list[np.ndarray]:
    """q, k, v and a cotangent, float32 normal."""
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(s.shape, np.float32) for s in spec.shapes()]


def jax_peer(attend: Callable) -> Peer:
    """A peer from ``attend(spec, q, k, v)`` in jax."""

    def peer(spec, *qkvg):
        q, k, v, g = (jnp.asarray(x, jnp.dtype(spec.dtype)) for x in qkvg)
        forward = jax.jit(lambda q, k, v: attend(spec, q, k, v))

        @jax.jit
        def both(q, k, v, g):
            out, pull = jax.vjp(lambda q, k, v: attend(spec, q, k, v), q, k, v)
            return out, pull(g)

        return lambda backward: lambda: jax.block_until_ready(both(q, k, v, g) if backward else forward(q, k, v))

    return peer


def ours(implementation: str | None = None) -> Peer:
    """This library."""

    def attend(spec, q, k, v):
        return chunk_attention(q, k, v, spec.pattern, implementation=implementation)

    return jax_peer(attend)


def masked_dense() -> Peer:
    """All logits, then a mask: what a plain implementation does."""

    def attend(spec, q, k, v):
        mask = jnp.asarray(spec.pattern.dense_mask())[None, None]
        return jax.nn.dot_product_attention(q, k, v, mask=mask, implementation="xla")

    return jax_peer(attend)


def splash() -> Peer:
    """jax's splash attention for TPU, with the table as its mask."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

    def attend(spec, q, k, v):
        mask = splash_attention_mask.NumpyMask(spec.pattern.dense_mask())
        heads = splash_attention_mask.MultiHeadMask([mask] * spec.heads)
        kernel = splash_attention_kernel.make_splash_mha(mask=heads, head_shards=1, q_seq_shards=1)
        swap = [jnp.swapaxes(x, 1, 2) for x in (q * jnp.asarray(spec.dim**-0.5, q.dtype), k, v)]
        return jnp.swapaxes(jax.vmap(kernel)(*swap), 1, 2)

    return jax_peer(attend)


def tokamax() -> Peer:
    """tokamax's attention with the table as a boolean mask."""
    import tokamax as library

    def attend(spec, q, k, v):
        return library.dot_product_attention(q, k, v, mask=jnp.asarray(spec.pattern.dense_mask())[None, None])

    return jax_peer(attend)


def default_peers() -> dict[str, Callable[[], Peer]]:
    """Peers of the current platform by name, made on use: what is missing or cannot run is a result of ``measure``."""
    platform = select.device()[0]
    *fast, _ = backends.names()  # the last one is the definition: masked dense
    peers = {"ours": ours} | {f"ours, {name}": functools.partial(ours, name) for name in fast}
    if platform == "tpu":
        peers["splash"] = splash
    elif platform in ("gpu", "cuda"):
        peers["tokamax"] = tokamax
    return peers | {"masked dense": masked_dense}


def measure(
    spec: Spec,
    peers: Mapping[str, Callable[[], Peer]],
    median_ms: Callable[[Callable[[], Any], int], float],
    *,
    repeats: int = REPEATS,
) -> dict[str, dict]:
    """Milliseconds of every peer on one spec.

    Args:
      spec: the workload.
      peers: name -> factory of a peer.
      median_ms: the clock, ``measure.clock.median_ms``.
      repeats: timed runs.

    Returns:
      {peer: {"forward": ms, "forward_backward": ms}} with medians; {"error": reason} for a peer that cannot run.
    """
    inputs = arrays(spec)
    passes = {"forward": False, "forward_backward": True}
    result = {}
    for name, factory in peers.items():
        try:
            made = factory()(spec, *inputs)
            result[name] = {label: median_ms(made(backward), repeats) for label, backward in passes.items()}
        except Exception as error:  # any way in which someone else's library can fail is a result here
            result[name] = {"error": f"{type(error).__name__}: {str(error).partition(chr(10))[0][:120]}"}
    return result
