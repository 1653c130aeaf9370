"""Closed-form FLOPs against matmuls counted in the jaxpr, and against docs/method.md, section 11, at 1.3B."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from greedy_distill_jax.config import read_settings
from greedy_distill_jax.diffusion.step_plan import StepPlan
from greedy_distill_jax.models import flops
from greedy_distill_jax.models.students.base import History
from greedy_distill_jax.models.students.config import CausalConfig, StudentConfig
from greedy_distill_jax.models.students.make import make_student
from greedy_distill_jax.models.wan.config import WAN_SIZES, WanConfig
from greedy_distill_jax.models.wan.dit import Teacher
from greedy_distill_jax.pods import costs
from greedy_distill_jax.streaming.make import make_streamer
from greedy_distill_jax.testing import tiny
from greedy_distill_jax.testing.matmuls import count_matmuls
from greedy_distill_jax.training import rollout

# 64 tokens a frame: chunk pairs are above the op's area for gathering, so that it computes visible pairs only.
BASE = WanConfig(
    dim=48,
    ffn_dim=160,
    num_heads=2,
    num_layers=4,
    channels=4,
    freq_dim=16,
    text_dim=24,
    text_len=32,
    dtype="float32",
    remat="none",
)
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
    [
        *(dataclasses.replace(STUDENT, fusion=f) for f in ("selfkv", "xattn2", "replace", "add", "concat", "adaln")),
        dataclasses.replace(STUDENT, chunk=2, rope_mode="absolute", sink=1),
        dataclasses.replace(STUDENT, context="last_step_kv"),
        *(dataclasses.replace(STUDENT, fusion=f, context_weights="own") for f in ("selfkv", "replace", "adaln")),
        CausalConfig(base=BASE, chunk=1, window=3, sink=1, max_frames=FRAMES, context_weights="own"),
        CausalConfig(base=BASE, chunk=1, window=3, sink=1, max_frames=FRAMES),
        CausalConfig(base=BASE, chunk=1, window=3, sink=1, max_frames=FRAMES, context="last_step_kv"),
    ],
    ids=lambda cfg: f"{getattr(cfg, 'fusion', 'causal')}-{cfg.context}-{cfg.context_weights}",
)
def test_the_students(cfg):
    student = make_student(cfg)
    params = _params(student)
    expected = flops.student(cfg, FRAMES, TOKENS)
    counted = count_matmuls(student, params, VIDEO, _shape(1, FRAMES), TEXT, History(VIDEO, _shape(1, 1)))
    assert counted == pytest.approx(expected.total, rel=0.001)
    plan = StepPlan(((1.0, 0.7, 0.4),), "renoise")
    streamer = make_streamer(student, plan)

    for exit, trips in (("last", 3.0), ("random", 2.0)):

        def self_made(params, text, key, exit=exit):
            return rollout.roll_out(streamer, params, text, key, (FRAMES, *LATENT), exit)

        counted = count_matmuls(self_made, params, TEXT, jax.random.key(0), while_trips=trips)
        expected = flops.rollout(cfg, FRAMES, TOKENS, plan, exit)
        assert counted == pytest.approx(expected.total, rel=0.02)


@pytest.mark.parametrize("remat", ["none", "full"])
def test_an_update_with_what_it_recomputes(remat):
    cfg = dataclasses.replace(BASE, remat=remat)
    net = Teacher(cfg)

    def loss(params, x, sigma, text):
        return jnp.sum(net(params, x, sigma, text))

    counted = count_matmuls(jax.grad(loss), _params(net), VIDEO, _shape(1, 1), TEXT)
    assert counted == pytest.approx(flops.teacher(cfg, FRAMES, TOKENS).executed(remat).total, rel=0.02)


@pytest.mark.parametrize("fusion", ["selfkv", "xattn2", "add"])
@pytest.mark.parametrize("context", ["clean", "last_step_kv", "fused"])
def test_a_step_of_a_stream(fusion, context):
    cfg = dataclasses.replace(STUDENT, fusion=fusion, context=context)
    streamer = make_streamer(make_student(cfg), StepPlan(((1.0, 0.7, 0.4),), "renoise"))
    params = _params(streamer.student)
    state = jax.eval_shape(lambda p, text, key: streamer.init(p, text, key, LATENT), params, TEXT, jax.random.key(0))
    loop = 2.0 if context == "fused" else 3.0
    counted = count_matmuls(streamer.step, params, state, while_trips=loop)
    assert counted == pytest.approx(flops.stream_step(cfg, TOKENS, 3).total, rel=0.001)


UPDATES = {
    "teacher": dict(stage="teacher"),
    "stage 1, two draws": dict(stage="teacher_forcing", losses__flow_matching__options=dict(draws=2)),
    "joint teacher, critic": dict(stage="dmd", distill__draws=2),
    "causal, stage 1's score": dict(stage="dmd", student__kind="causal", distill__fake="stage1"),
    "causal, causal teacher": dict(stage="dmd", student__kind="causal", distill__real="autoregressive"),
    "per-frame teacher": dict(stage="dmd", distill__real="per_frame", distill__fake="self_sg", distill__guidance=1.0),
    "weights of the context pass": dict(
        stage="dmd", student__context_weights="own", distill__context_grad_sdd="params"
    ),
    "through the contexts": dict(stage="dmd", distill__pg="rollout_full", distill__context_grad_sdd="params"),
    "three epochs": dict(stage="dmd", distill__pg="actor_critic", distill__epochs=3),
    "three epochs and a second term": dict(
        stage="dmd",
        distill__pg="actor_critic",
        distill__epochs=3,
        distill__fake="self_fm",
        losses__own=dict(loss="flow_matching", weight=1.0, options={}),
    ),
    "motion, in a learned feature too, and a teacher's samples": dict(
        stage="dmd",
        distill__draws=2,
        distill__skip=1,
        losses__motion=dict(loss="motion", weight=1.0, options={}),
        losses__head=dict(loss="motion_head", weight=1.0, options={}),
        losses__ode=dict(loss="ode", weight=1.0, options={}),
        motion_head__layers=3,
    ),
}


@pytest.mark.parametrize("changes", UPDATES.values(), ids=UPDATES)
def test_an_update_of_every_stage(changes):
    size = {f"model__{name}": getattr(BASE, name) for name in ("dim", "ffn_dim", "num_layers", "text_len")}
    size |= dict(optimizer__name="adamw", model__remat="full")
    if changes["stage"] == "dmd":
        size |= dict(critic__optimizer__name="adamw")
    changes = size | changes
    if changes.get("distill__fake", "critic") != "critic":
        changes |= dict(distill__generator_every=1, distill__critic_warmup=0)
    config = tiny.train_config(changes.pop("stage"), data__batch=2, **changes)
    latent = (FRAMES, 16, 16, 16)
    stage, params = tiny.stage_of(config, latent)
    settings = read_settings(config, imagine_runs=True)
    state, expected = jax.eval_shape(stage.state, params), costs.part_costs(settings, stage, latent)
    for part in stage.parts:
        mean_steps = (config.sample.steps + 1) / 2
        arguments = state, stage.frozen, settings.kind.batch_shapes(settings, latent), dict(part.takes)
        counted = count_matmuls(lambda *args, part=part: part.call(*args)[:2], *arguments, while_trips=mean_steps)
        assert counted == pytest.approx(expected[part.name].executed.total, rel=0.02), part.name


def test_the_published_sizes():
    """docs/method.md, section 11: one block and one frame of 1560 tokens; 30 blocks."""
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


@pytest.mark.parametrize("after", [0, 1])
def test_the_rollout_of_groups(after):
    """Of the longest stream: two chunks before the streams part, and as many denoising steps per chunk."""
    size = {f"model__{name}": getattr(BASE, name) for name in ("dim", "ffn_dim", "num_layers", "text_len")}
    size |= dict(optimizer__name="adamw", student_from="a run", text_dropout=0.0, data__batch=2, sample__steps=2)
    lengths = dict(rl__frames=4 + after, rl__clip=2, rl__after=after, rl__group=3, data__frames=FRAMES)
    config = tiny.train_config("rl", **size, **lengths)
    with config.unlocked():
        del config.losses["flow_matching"]
        config.losses.nft = dict(loss="nft", weight=1.0, options={})
        config.rl.rewards.colour = dict(reward="colour_kept", weight=1.0)
    latent = (FRAMES, 16, 16, 16)
    stage, params = tiny.stage_of(config, latent)
    settings = read_settings(config, imagine_runs=True)
    expected = costs.part_costs(settings, stage, latent)
    assert list(expected) == [part.name for part in stage.parts] and not costs.assumed(settings)
    arguments = jax.eval_shape(stage.state, params), stage.frozen, settings.kind.batch_shapes(settings, latent), {}
    counted = count_matmuls(stage.parts[0].call, *arguments, while_trips=2.0)
    assert counted == pytest.approx(expected["rollout"].executed.total, rel=0.001)
