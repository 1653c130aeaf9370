"""Named workloads of the attention op: the calls that the networks make at published sizes, compiled, tuned and timed.

Their patterns are those that the models build (``models/students/patterns.py``), so what is compiled and timed here is
what runs. A latent frame of Wan2.1 at 480p (60 x 104 latents, patches of 2) has 1560 tokens, at 720p (90 x 160) 3600;
81 video frames are 21 latent ones.
"""

import dataclasses
from collections.abc import Iterator

from greedy_distill_jax.models.students import patterns
from greedy_distill_jax.models.students.config import CausalConfig, StudentConfig
from greedy_distill_jax.models.wan.config import WAN_SIZES, WanConfig
from greedy_distill_jax.ops.attention import Pattern
from greedy_distill_jax.ops.attention.arg_specs import Spec

FRAME = {"480p": 1560, "720p": 3600}
MODELS = {"1.3b": "wan1_3b", "14b": "wan14b"}
FRAMES = 21


def attention_calls(wan: WanConfig, tokens: int, frames: int) -> dict[str, Pattern]:
    """Parallel passes over a video, and the calls of a stream, of a teacher and both students.

    Args:
      wan: the teacher's architecture.
      tokens: of a latent frame.
      frames: latent frames of the video, at least a chunk of the causal student.
    """
    etm_sdd, causal = StudentConfig(base=wan), CausalConfig(base=wan)
    chunk = tokens * causal.chunk
    return {
        "teacher": Pattern.full(frames, tokens),
        "etm": patterns.etm_parallel(etm_sdd, frames, tokens).pattern,
        "sdd": patterns.sdd_parallel(etm_sdd, frames, tokens).pattern,
        "causal": patterns.causal_parallel(causal, frames // causal.chunk, chunk).pattern,
        "sdd step": patterns.sdd_step(etm_sdd, tokens).pattern,
        "etm step": patterns.etm_step(etm_sdd, tokens).pattern,
        "causal step": patterns.causal_step(causal, chunk).pattern,
    }


def _network(model: str, size: str) -> Iterator[Spec]:
    wan = WanConfig(**WAN_SIZES[MODELS[model]])
    for name, pattern in attention_calls(wan, FRAME[size], FRAMES).items():
        yield Spec(f"{model} {size} {name}", pattern, wan.num_heads, wan.head_dim)


def _specs() -> Iterator[Spec]:
    tiny = patterns.etm_parallel(StudentConfig(window=4), 8, 16).pattern
    yield Spec("tiny etm", tiny, heads=2, dim=64, dtype="float32")
    yield from _network("1.3b", "480p")
    for spec in _network("14b", "720p"):
        if spec.name.endswith(("etm", "sdd", "causal step")):
            # One of four chips that share the heads: SDD's pass over a video does not fit a v5e with all of them.
            yield dataclasses.replace(spec, heads=spec.heads // 4)
    wan = WanConfig()
    long = patterns.etm_parallel(StudentConfig(base=wan), 128, FRAME["480p"]).pattern
    yield Spec("1.3b 480p etm 128 frames", long, wan.num_heads, wan.head_dim)


SPECS = {spec.name: spec for spec in _specs()}


def _laptop(chunks: int, heads: int) -> Spec:
    pattern = patterns.etm_parallel(StudentConfig(window=4), chunks, 128).pattern
    return Spec(f"cpu {chunks} x 128, {heads} heads", pattern, heads, dim=64, dtype="float32")


# What a laptop can time: one workload for the comparison with peers, and three for the growth of the time per chunk.
CPU_PEERS = _laptop(32, heads=4)
# Arrays stay below 32 MB, from where on malloc maps fresh pages at every call and clearing them is counted as well.
CPU_GROWTH = tuple(_laptop(chunks, heads=2) for chunks in (64, 128, 256))
