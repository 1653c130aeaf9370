"""A stream whose older history is real: what tells whether a stream drifts because of its cache or of its denoiser.

References:
  OPSD-V, arXiv 2607.08766: old cache entries are replaced by real frames, the last generated chunk stays.
"""

from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float32

from greedy_distill_jax.streaming.causal import CausalState, CausalStreamer
from greedy_distill_jax.streaming.etm_sdd import Streamer, StreamState


def refreshed_stream(
    streamer: Streamer | CausalStreamer,
    params: Any,
    state: StreamState | CausalState,
    real_BTHWC: Float32[Array, "B T H W C"],
    *,
    start: int = 0,
    keep: int = 1,
) -> Float32[Array, "B T H W C"]:
    """A stream of T frames that makes every chunk on real history, except for its own ``keep`` chunks just before it.

    A second state observes the real video. Every chunk starts from that state, which first observes the stream's own
    last chunks: rings, sinks and frame 0 hold what a stream of exactly these frames would have left there. Noise is
    that of the plain stream, and so are the first ``keep`` + 1 chunks that are made, which have no older history; with
    ``keep`` of at least all chunks that are made it is the plain stream. In context mode "last_step_kv" the chunks of
    the history have the keys of given ones (``Streamer.observe``). A chunk costs ``keep`` + 1 observations more.

    Args:
      streamer, params: of the student.
      state: an empty stream, of ``Streamer.init``.
      real_BTHWC: real videos of the stream's prompts; the last ``keep`` + 1 chunks only give the length.
      start: frames that the stream begins with, taken from the real videos. Without, what prompts do not tell is another
        in the stream than in its history.
      keep: chunks; with 0 every chunk is made one step ahead of the real video.
    """
    real = rearrange(real_BTHWC, "b (n g) h w c -> n b g h w c", g=streamer.cfg.chunk)
    given, real = jnp.split(real, [streamer.student.chunks_of(start) if start else 0])
    plain = min(keep + 1, len(real))

    def observe(state, x0):
        return streamer.observe(params, state, x0)[0], None

    def chunk(carry, x0):
        past, own = carry
        past, _ = observe(past, x0)
        present, _ = jax.lax.scan(observe, past, own)
        _, made = streamer.step(params, present)
        return (past, jnp.concatenate([own, made[None]])[1:]), made

    state, _ = jax.lax.scan(observe, state, given)
    _, first = jax.lax.scan(lambda state, _: streamer.step(params, state), state, length=plain)
    _, rest = jax.lax.scan(chunk, (state, first[1:]), real[: len(real) - plain])
    return rearrange(jnp.concatenate([given, first, rest]), "n b g h w c -> b (n g) h w c")
