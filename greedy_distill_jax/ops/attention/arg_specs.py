"""Named workloads: the shapes that are compiled, tuned and timed.

A latent frame of Wan2.1 at 480p (60 x 104 latents, patches of 2) has 1560 tokens, at 720p (90 x 160) 3600; 81 video
frames are 21 latent ones. The 1.3B model has 12 heads of 128, the 14B model 40 (METHOD_SPEC A.1).
"""

import dataclasses

import jax
import jax.numpy as jnp

from greedy_distill_jax.ops.attention.schedule import Schedule

FRAME = {"480p": 1560, "720p": 3600}
HEADS = {"1.3b": 12, "14b": 40}
FRAMES, DIM, WINDOW, SINK = 21, 128, 4, 1


@dataclasses.dataclass(frozen=True)
class Spec:
    """One workload.

    Attributes:
      name: what it is called in tables.
      schedule: the chunk table; for a decode the slots are its key chunks.
      heads: attention heads.
      dim: head dim.
      dtype: of q, k and v.
      batch: examples.
      decode: whether it is ``decode_attention`` (one chunk of queries, no gradient).
    """

    name: str
    schedule: Schedule
    heads: int
    dim: int = DIM
    dtype: str = "bfloat16"
    batch: int = 1
    decode: bool = False

    @property
    def flops(self) -> int:
        """Floating-point operations of the two matmuls of a forward pass, on unmasked pairs only."""
        return 4 * self.batch * self.heads * self.dim * self.schedule.pairs

    def shapes(self, sharding=None) -> list[jax.ShapeDtypeStruct]:
        """q, k, v and the cotangent of the output."""
        table = self.schedule
        q, k = table.num_q_chunks * table.q_chunk, table.num_k_chunks * table.k_chunk
        return [
            jax.ShapeDtypeStruct((self.batch, n, self.heads, self.dim), jnp.dtype(self.dtype), sharding=sharding)
            for n in (q, k, k, q)
        ]


def _specs():
    yield Spec("tiny etm", Schedule.sliding_window(8, 16, WINDOW), heads=2, dim=64, dtype="float32")
    for size, model in (("480p", "1.3b"), ("720p", "14b")):
        tokens, heads = FRAME[size], HEADS[model]
        yield Spec(f"{model} {size} etm", Schedule.sliding_window(FRAMES, tokens, WINDOW), heads)
        yield Spec(f"{model} {size} sdd", Schedule.sdd(FRAMES, tokens), heads)
        slots = Schedule.from_table([range(SINK + WINDOW)], q_chunk=tokens, num_k_chunks=SINK + WINDOW)
        yield Spec(f"{model} {size} decode", slots, heads, decode=True)
    for size, model in (("720p", "1.3b"), ("480p", "14b")):
        yield Spec(f"{model} {size} etm", Schedule.sliding_window(FRAMES, FRAME[size], WINDOW), HEADS[model])
    tokens, heads = FRAME["480p"], HEADS["1.3b"]
    forcing = Schedule.teacher_forcing(FRAMES, tokens, WINDOW, SINK)
    yield Spec("1.3b 480p teacher forcing", forcing, heads)
    yield Spec("1.3b 480p etm 128 frames", Schedule.sliding_window(128, tokens, WINDOW, SINK), heads)


SPECS = {spec.name: spec for spec in _specs()}


def _laptop(chunks: int, heads: int) -> Spec:
    table = Schedule.sliding_window(chunks, 128, WINDOW)
    return Spec(f"cpu {chunks} x 128, {heads} heads", table, heads, dim=64, dtype="float32")


# What a laptop can time: one workload for the comparison with peers, and three for the growth of the time per chunk.
CPU_PEERS = _laptop(32, heads=4)
# Arrays stay below 32 MB, from where on malloc maps fresh pages at every call and clearing them is counted as well.
CPU_GROWTH = tuple(_laptop(chunks, heads=2) for chunks in (64, 128, 256))
