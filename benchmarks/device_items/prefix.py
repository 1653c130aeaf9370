"""A probe of what streams could do on an NVIDIA GPU, made of what jax has: cuDNN attention without a mask.

Streams hide the cache slots that are still empty with a traced mask, which cuDNN's fused attention does not take, so
that they fall back to a scan in XLA. Softmax does not care about the order of keys: here the key chunks that a query
chunk sees are copied to the front, and their number goes to ``jax.nn.dot_product_attention`` as the length of the keys.
"""

import contextlib
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from einops import rearrange, repeat

from greedy_distill_jax import parallel, run as runs
from greedy_distill_jax.ops.sliding_window import Schedule, select


def attend(q_BLNK, k_BSNK, v_BSNK, schedule: Schedule, visible_QS, *, inner: str = "cudnn"):
    """``chunk_attention(..., visible_QS=...)``: visible chunks first, the rest cut off by the length of the keys.

    Args:
      q_BLNK, k_BSNK, v_BSNK, schedule, visible_QS: of ``chunk_attention``.
      inner: implementation of ``jax.nn.dot_product_attention``.
    """
    index, listed = schedule.padded()
    seen = jnp.take_along_axis(visible_QS, jnp.asarray(index), axis=1) & jnp.asarray(listed)
    picked = jnp.take_along_axis(jnp.asarray(index), jnp.argsort(~seen, axis=1, stable=True), axis=1)
    lengths = repeat(jnp.sum(seen, axis=1, dtype=jnp.int32) * schedule.k_chunk, "c -> (b c)", b=len(q_BLNK))

    def front(x):
        chunks = rearrange(x, "b (c s) n k -> b c s n k", s=schedule.k_chunk)
        return rearrange(chunks[:, picked], "b c p s n k -> (b c) (p s) n k")

    queries = rearrange(q_BLNK, "b (c l) n k -> (b c) l n k", l=schedule.q_chunk)
    out = jax.nn.dot_product_attention(
        queries, front(k_BSNK), front(v_BSNK), key_value_seq_lengths=lengths, implementation=inner
    )
    out = jnp.where((lengths > 0)[:, None, None, None], out, jnp.zeros((), out.dtype))
    return rearrange(out, "(b c) l n k -> b (c l) n k", b=len(q_BLNK))


def everything(q_BLNK, k_BSNK, v_BSNK, schedule: Schedule, visible_QS):
    """The same where every slot is filled, as it is from some frame on: no lengths, no copy."""
    del visible_QS
    return parallel_attention(q_BLNK, k_BSNK, v_BSNK, schedule)


parallel_attention = parallel.chunk_attention


@contextlib.contextmanager
def streams_by(function=attend) -> Iterator[None]:
    """What is traced meanwhile takes ``function`` wherever a mask is traced and cuDNN could run without it.

    Raises:
      RuntimeError: nothing was traced that it could have replaced.
    """
    replaced = 0

    def chosen(q, k, v, schedule, *, visible_QS=None, **options):
        nonlocal replaced
        if visible_QS is None or options:
            return parallel_attention(q, k, v, schedule, visible_QS=visible_QS, **options)
        replaced += 1
        on_gpu = select.device()[0] in ("gpu", "cuda")
        if function is attend and on_gpu and select.why_not("cudnn", q) is not None:
            return parallel_attention(q, k, v, schedule, visible_QS=visible_QS)
        options = {} if function is not attend or on_gpu else {"inner": "xla"}
        return function(q, k, v, schedule, visible_QS, **options)

    runs._jitted_stream.cache_clear()  # programs that were traced before
    parallel.chunk_attention = chosen
    try:
        yield
    finally:
        parallel.chunk_attention = parallel_attention
        runs._jitted_stream.cache_clear()
    if not replaced:
        raise RuntimeError("the probe replaced no attention: nothing was traced, or nothing with a mask")
