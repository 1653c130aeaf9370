"""A probe of what streams could do on an NVIDIA GPU, made of what jax has: cuDNN attention without a mask.

Streams hide the cache slots that are still empty with a traced mask, which cuDNN's fused attention does not take, so
that they fall back to a scan in XLA. Softmax does not care about the order of keys: here the key chunks that a query
chunk sees are copied to the front, and their number goes to ``jax.nn.dot_product_attention`` as the length of the keys.

Both probes are backends of the attention op that are registered for as long as a benchmark traces its programs; the
library does not have them.
"""

import contextlib
import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from einops import rearrange, repeat

from greedy_distill_jax.ops.attention import backends, chunk_attention, select
from greedy_distill_jax.ops.attention.backends import cudnn
from greedy_distill_jax.ops.attention.backends.record import Backend, Call, Request


def why_not(request: Request) -> str | None:
    """See ``record.Backend``: calls with a mask, and on a GPU what cuDNN takes."""
    if not request.hides_chunks:
        return "it is for calls that hide chunks at run time (visible_QS)"
    return cudnn.why_not(request._replace(hides_chunks=False)) if request.platform == "gpu" else None


def attend(q_BLNK, k_BSNK, v_BSNK, visible_QS, call: Call):
    """See ``record.Backend``: visible chunks first, the rest cut off by the length of the keys."""
    pattern = call.pattern
    index, listed = pattern.padded()
    seen = jnp.take_along_axis(visible_QS, jnp.asarray(index), axis=1) & jnp.asarray(listed)
    picked = jnp.take_along_axis(jnp.asarray(index), jnp.argsort(~seen, axis=1, stable=True), axis=1)
    lengths = repeat(jnp.sum(seen, axis=1, dtype=jnp.int32) * pattern.k_chunk, "c -> (b c)", b=len(q_BLNK))

    def front(x):
        chunks = rearrange(x, "b (c s) n k -> b c s n k", s=pattern.k_chunk)
        return rearrange(chunks[:, picked], "b c p s n k -> (b c) (p s) n k")

    queries = rearrange(q_BLNK, "b (c l) n k -> (b c) l n k", l=pattern.q_chunk)
    out = jax.nn.dot_product_attention(
        queries,
        front(k_BSNK),
        front(v_BSNK),
        scale=call.scale,
        key_value_seq_lengths=lengths,
        implementation="cudnn" if select.device()[0] in ("gpu", "cuda") else "xla",
    )
    out = jnp.where((lengths > 0)[:, None, None, None], out, jnp.zeros((), out.dtype))
    return rearrange(out, "(b c) l n k -> b (c l) n k", b=len(q_BLNK))


def everything(q_BLNK, k_BSNK, v_BSNK, visible_QS, call: Call):
    """The same where every slot is filled, as it is from some frame on: no lengths, no copy."""
    del visible_QS
    return chunk_attention(q_BLNK, k_BSNK, v_BSNK, call.pattern, scale=call.scale)


PREFIX = Backend("prefix", why_not, attend, partitionable=False)
NO_MASK = Backend("no mask", why_not, everything, partitionable=False)


@contextlib.contextmanager
def streams_by(backend: Backend = PREFIX) -> Iterator[None]:
    """What is traced meanwhile takes ``backend`` wherever it can run.

    Raises:
      RuntimeError: nothing was traced that it could have computed.
    """
    traced, before = 0, backends.BACKENDS

    def attend(*arguments):
        nonlocal traced
        traced += 1
        return backend.attend(*arguments)

    backends.register(dataclasses.replace(backend, attend=attend))
    try:
        yield
    finally:
        backends.BACKENDS = before
    if not traced:
        raise RuntimeError(f"the probe {backend.name!r} was not used: nothing was traced, or nothing with a mask")
