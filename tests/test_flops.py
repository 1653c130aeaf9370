"""Closed-form FLOPs against matmuls counted in the jaxpr, and against METHOD_SPEC A.10 at 1.3B."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from greedy_distill_jax import flops, rollout
from greedy_distill_jax.models.causal import make_student
from greedy_distill_jax.models.dit import Teacher
from greedy_distill_jax.models.student import History
from greedy_distill_jax.models.wan_config import WAN_SIZES, CausalConfig, StudentConfig, WanConfig
from greedy_distill_jax.stream import Sampling
from greedy_distill_jax.stream_causal import make_streamer
from greedy_distill_jax.testing.matmuls import count_matmuls

# 64 tokens a frame: chunk pairs are above the op's area for gathering, so that it computes visible pairs only.
BASE = WanConfig(
    dim=48, ffn_dim=160, num_heads=2, num_layers=4, channels=4, freq_dim=16, text_dim=24, text_len=32, dtype="float32",
    remat="none",
)  # fmt: skip
FRAMES, LATENT, TOKENS = 4, (16, 16, 4), 64
STUDENT = StudentConfig(base=BASE, etm_layers=(0, 2), sdd_layers=(1, 3), window=2, rope_frames=FRAMES)


def _shape(*dims):
    return jax.ShapeDtypeStruct(dims, jnp.float32)


def _params(model):
    return jax.eval_shape(lambda key: model.init(key, (1, *LATENT)), jax.random.key(0))


VIDEO, TEXT = _shape(1, FRAMES, *LATENT), _shape(1, BASE.text_len, BASE.text_dim)


def test_the_teacher():
    net = Teacher(BASE)
    args = _params(net), VIDEO, _shape(1, 1), TEXT
    expected = flops.teacher(BASE, FRAMES, TOKENS)
    assert count_matmuls(net, *args) == pytest.approx(expected.total, rel=0.001)


@pytest.mark.parametrize(
    "cfg",
    [*(dataclasses.replace(STUDENT, fusion=f) for f in ("selfkv", "xattn2", "replace", "add", "concat", "adaln")),
     dataclasses.replace(STUDENT, chunk=2, rope_mode="absolute", sink=1),
     CausalConfig(base=BASE, chunk=1, window=3, sink=1, max_frames=FRAMES)],
    ids=lambda cfg: getattr(cfg, "fusion", "causal"),
)  # fmt: skip
def test_the_students(cfg):
    student = make_student(cfg)
    params = _params(student)
    expected = flops.student(cfg, FRAMES, TOKENS)
    counted = count_matmuls(student, params, VIDEO, _shape(1, FRAMES), TEXT, History(VIDEO, _shape(1, 1)))
    assert counted == pytest.approx(expected.total, rel=0.001)
    sampling = Sampling(((1.0, 0.7, 0.4),), "renoise")
    streamer = make_streamer(student, sampling)

    def self_made(params, text, key):
        return rollout.roll_out(streamer, params, text, key, (FRAMES, *LATENT), "last")

    counted = count_matmuls(self_made, params, TEXT, jax.random.key(0), while_trips=3)
    expected = flops.rollout(cfg, FRAMES, TOKENS, sampling, "last")
    assert counted == pytest.approx(expected.total, rel=0.02)


@pytest.mark.parametrize("remat", ["none", "full"])
def test_an_update_with_what_it_recomputes(remat):
    cfg = dataclasses.replace(BASE, remat=remat)
    net = Teacher(cfg)

    def loss(params, x, sigma, text):
        return jnp.sum(net(params, x, sigma, text))

    counted = count_matmuls(jax.grad(loss), _params(net), VIDEO, _shape(1, 1), TEXT)
    assert counted == pytest.approx(flops.teacher(cfg, FRAMES, TOKENS).executed(remat).total, rel=0.02)


def test_the_published_sizes():
    """METHOD_SPEC A.10: one block and one frame of 1560 tokens; 30 blocks."""
    wan = WanConfig(**WAN_SIZES["wan1_3b"])
    one = flops.blocks(wan, 1, 1560, 1560**2)
    assert one.linear == pytest.approx(130.0e9, rel=0.001)
    assert one.attention == pytest.approx((4.9 + 14.95) * 1e9, rel=0.003)
    everything = flops.blocks(wan, 30, 1560, 12 * 1560**2)
    assert everything.total == pytest.approx((3.90 + 0.147 + 0.449 * 12) * 1e12, rel=0.002)
    student = CausalConfig(base=wan, chunk=1, window=0, sink=0, max_frames=24)
    # Self-Forcing: five passes at a mean context of about 12 frames are about 47 TF.
    passes = 5 * everything
    assert passes.total == pytest.approx(47e12, rel=0.02)
    assert flops.stream_step(student, 1560, 4).total > 0
