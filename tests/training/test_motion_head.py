"""Stage 2 with a learned feature of motion: the head is trained beside the student (a run: test_teacher_samples)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from greedy_distill_jax.config import read_settings
from greedy_distill_jax.distribution.mesh import make_mesh
from greedy_distill_jax.distribution.parallel import on_mesh
from greedy_distill_jax.distribution.sharding import shardings
from greedy_distill_jax.errors import UserError
from greedy_distill_jax.losses.contrast import contrast
from greedy_distill_jax.pods.jobs import build_job
from greedy_distill_jax.testing import tiny
from greedy_distill_jax.training import job, motion_head
from greedy_distill_jax.training.update import accumulate

LATENT = (4, 4, 4, 16)
TERM = dict(loss="motion_head", weight=0.5, options={})
STILL = dict(optimizer__warmup=0, critic__optimizer__warmup=0, motion_head__optimizer__warmup=0)


def config_of(**changes):
    small = dict(motion_head__width=8, motion_head__layers=1)
    config = tiny.train_config("dmd", **{"sample__sampler": "renoise", "data__batch": 2, **STILL, **small, **changes})
    config.losses.motion = TERM
    return config


def text_of(count=2):
    return {"text": jax.random.normal(jax.random.key(0), (count, 6, 8))}


def step_of(stage):
    """Student and head, jitted: (state, frozen, batch) -> (state, metrics, what is left of the carry)."""

    @jax.jit
    def step(state, frozen, batch):
        metrics, carry = {}, {}
        for part in stage.parts[:2]:  # a critic takes no part in it
            state, found, carry = part.call(state, frozen, batch, carry)
            metrics |= found
        return state, metrics, carry

    return step


def moved(before, after):
    pairs = zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True)
    return [float(np.abs(np.asarray(a) - np.asarray(b)).max()) > 0 for a, b in pairs]


def assert_close(a, b, **tolerance):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, **tolerance)


@pytest.mark.parametrize(
    "changes",
    [
        dict(),
        dict(data__accumulate=2, distill__draws=2, distill__skip=1),
        dict(distill__pg="actor_critic", distill__epochs=2, distill__fake="self_sg", distill__generator_every=1),
        dict(data__batch=1, student__kind="causal", distill__fake="self_sg", distill__generator_every=1),
    ],
    ids=str,
)
def test_a_step_trains_the_student_and_the_head_and_its_average_follows(changes):
    config = config_of(**changes)
    stage, params = tiny.stage_of(config, LATENT)
    assert [part.name for part in stage.parts][:2] == ["dmd", "motion_head"]
    start, step = jax.jit(stage.state)(params), step_of(stage)
    state, metrics, carry = step(start, stage.frozen, text_of(config.data.batch))
    assert carry == {} and all(np.isfinite(float(x)) for x in metrics.values())
    assert {"motion", "motion_head/contrast", "motion_head/accuracy", "motion_head/grad_norm"} <= set(metrics)
    assert np.mean(moved(start.nets["student"].params, state.nets["student"].params)) > 0.9
    before, after = start.nets["motion_head"], state.nets["motion_head"]
    # At the start the last layer is zero, and hides the ones before it.
    assert moved(before.params["mix"], after.params["mix"]) == [True, True]
    expected = jax.tree.map(lambda old, new: old + 0.05 * (new - old), before.ema, after.params)
    assert_close(after.ema, expected, atol=1e-7)
    later, _, _ = step(state._replace(step=jnp.int32(1)), stage.frozen, text_of(config.data.batch))
    assert all(moved(after.params, later.nets["motion_head"].params))


def test_the_loss_follows_the_head():
    """What the student is trained on is the head as it is before the step, feature and average."""
    stage, params = tiny.stage_of(config_of(), LATENT)
    state = stage.state(params)

    @jax.jit  # what only the update needs is not compiled
    def distance(*args):
        return stage.parts[0].call(*args)[1]["motion/distance"]

    losses = []
    for ema in (0.0, 0.5):
        head = state.nets["motion_head"]
        kernel = jnp.full_like(head.params["mix"]["kernel"], ema)
        changed = head._replace(ema=head.ema | {"mix": {**head.ema["mix"], "kernel": kernel}})
        nets = {**state.nets, "motion_head": changed}
        losses.append(float(distance(state._replace(nets=nets), stage.frozen, text_of(), {})))
    assert losses[0] != losses[1]


def test_what_the_parts_hand_on():
    """The videos and the real score's answers, in the batch's order however many microbatches there are."""
    config = config_of(data__batch=4, data__accumulate=2)
    stage, params = tiny.stage_of(config, LATENT)
    dmd, head = stage.parts[:2]
    state = stage.state(params)  # the update of the student is not compiled: the head's does not depend on it
    carry = jax.jit(lambda *args: dmd.call(*args)[2])(state, stage.frozen, text_of(4), {"kept": jnp.ones(3)})
    assert carry.keys() == {"latents", "x0_real", "kept"}
    assert {name: x.shape for name, x in head.takes.items()} == dict.fromkeys(("latents", "x0_real"), (4, *LATENT))
    _, metrics, left = jax.jit(head.call)(state, stage.frozen, text_of(4), carry)
    assert left.keys() == {"kept"}
    moving = (jnp.diff(carry[name], axis=1) for name in ("latents", "x0_real"))  # the head starts as the identity
    np.testing.assert_allclose(metrics["motion_head/contrast"], jnp.mean(contrast(*moving)[0]), rtol=1e-5)

    def gradients(batch, keys):
        return jnp.mean(batch["a"]), {"same": batch["a"]}

    batch, keys = {"a": jnp.arange(8.0)}, jax.random.split(jax.random.key(0), 1)
    for count in (1, 2, 4):
        mean, kept = accumulate(gradients, batch, keys, count, keeps=True)
        assert float(mean) == 3.5
        np.testing.assert_array_equal(kept["same"], batch["a"])


def test_it_is_the_same_on_a_mesh():
    config = config_of(data__batch=4)
    stage, params = tiny.stage_of(config, LATENT)
    state, mesh = stage.state(params), make_mesh({"data": 2, "fsdp": 2, "context": 2})
    carry = dict(zip(("latents", "x0_real"), jax.random.normal(jax.random.key(3), (2, 4, *LATENT)), strict=True))
    call = stage.parts[1].call
    expected = jax.jit(call)(state, stage.frozen, text_of(4), carry)
    trees = (state, stage.frozen, text_of(4), carry)
    placed = jax.device_put(trees, shardings(trees, mesh))
    found = jax.jit(on_mesh(call, mesh))(*placed)
    assert_close(found[1], expected[1], rtol=1e-4)
    assert_close(found[0].nets["motion_head"].params, expected[0].nets["motion_head"].params, atol=1e-4)


def test_its_part_is_compiled_without_the_one_before_it():
    settings = read_settings(config_of(data__batch=4, mesh__fsdp=2), imagine_runs=True)
    built = build_job(settings, jax.devices()[:4], size=(4, 4), only="motion_head")
    (step,) = built.steps
    assert {x.sharding.spec[0] for x in step.arguments[-1].values()} == {("data", "fsdp")}
    step.call.lower(*step.arguments).compile()


def test_the_audit_sees_both_gradients(monkeypatch):
    def audited():
        stage, params = tiny.stage_of(config_of(), LATENT)
        parts = tuple(part._replace(call=jax.jit(part.call)) for part in stage.parts)
        return job.trace_parts(parts, stage.state(params), stage.frozen, text_of())

    assert audited() == []

    def stopped(feature, target, *, temperature):
        return contrast(jax.lax.stop_gradient(feature), target, temperature=temperature)

    monkeypatch.setattr(motion_head, "contrast", stopped)
    with pytest.raises(UserError, match=r"config\.motion_head\.contrast has no gradient"):
        audited()


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(data__batch=1, data__frames=2), r"has 1: config\.data\.batch = 1, config\.data\.frames = 2"),
        (dict(distill__skip=3), r"config\.distill\.skip = 3; use more examples or more frames"),
        (dict(motion_head__temperature=0.0), r"config\.motion_head\.temperature is 0\.0; it must be above 0"),
        (dict(motion_head__decay=1.0), r"config\.motion_head\.decay is 1\.0; it must be from 0 to below 1"),
    ],
    ids=str,
)
def test_what_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        read_settings(config_of(**changes))


def test_other_stages_have_no_head():
    config = tiny.train_config("teacher_forcing")
    config.losses.motion = TERM
    with pytest.raises(UserError, match=r"config\.losses\.motion: 'motion_head' asks for 'pair' of stage"):
        read_settings(config)
