"""Stage 3: groups of streams, rewards on the device and on the host, every loss through the training command."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from greedy_distill_jax import rewards
from greedy_distill_jax.codecs.patch import PatchCodec
from greedy_distill_jax.config import read_settings
from greedy_distill_jax.diffusion.step_plan import StepPlan
from greedy_distill_jax.distribution.mesh import make_mesh
from greedy_distill_jax.errors import UserError
from greedy_distill_jax.models.students.etm_sdd import Student
from greedy_distill_jax.runs.run import Run
from greedy_distill_jax.streaming.make import make_streamer
from greedy_distill_jax.testing import tiny
from greedy_distill_jax.train import train
from greedy_distill_jax.training import loop, reinforce
from greedy_distill_jax.training.group import Group
from greedy_distill_jax.training.job import initial_state, prepare_job
from greedy_distill_jax.training.metrics import read_scalars
from greedy_distill_jax.training.reinforce import Plan, draw_step

KEYS = dict(
    text_dropout=0.0,
    data__batch=8,
    sample__sampler="renoise",
    sample__steps=(3, 2),
    rl__group=2,
    rl__frames=8,
    rl__clip=4,
    optimizer__warmup=0,
)
COLOUR = {"colour": {"reward": "colour_kept", "weight": 1.0}}


def config_of(losses, rewards=COLOUR, **changes):
    """A run of stage rl; losses by name in the logs: a loss, or (loss, weight, options)."""
    config = tiny.train_config("rl", **{"student_from": "a run", **KEYS, **changes})
    with config.unlocked():
        del config.losses["flow_matching"]
        for name, term in losses.items():
            loss, weight, options = (term, 1.0, {}) if isinstance(term, str) else term
            config.losses[name] = dict(loss=loss, weight=weight, options=options)
        for name, term in rewards.items():
            config.rl.rewards[name] = dict(term)
    return config


@pytest.fixture(scope="module")
def student(tiny_student):
    return str(tiny_student)


LATENT = (4, 4, 4, 16)
CODEC = PatchCodec.fit(np.random.default_rng(0).integers(0, 255, (2, 4, 16, 16, 3), np.uint8))


@rewards.reward(kind="host")
def bright(view, *, of: float = 255.0):
    """Mean brightness; what it is given is checked here."""
    assert view.video_BTHWC.dtype == np.uint8 and view.first_BSHWC.shape[1] == 4
    assert len(view.captions) == len(view.video_BTHWC) and set(map(type, view.captions)) == {str}
    return (view.video_BTHWC.astype(np.float32).mean((1, 2, 3, 4)) / of).astype(np.float32)


@pytest.mark.slow
def test_losses_train_together_and_a_run_goes_on_bit_by_bit(student, same_programs, tmp_path):
    losses = {"direct": "direct", "nft": "nft"}
    still = {"still": {"reward": "flicker", "weight": 0.5, "judge": True}}
    config = config_of(losses, COLOUR | still, steps=4, checkpoint__every=2, student_from=student)
    whole = jax.device_get(train(config, tmp_path / "whole", show_progress=False))
    assert set(whole.nets) == {"student", "old"}
    shutil.copytree(tmp_path / "whole", tmp_path / "halves")  # as if it had been killed after it saved step 2
    shutil.rmtree(tmp_path / "halves" / "checkpoints" / "4")
    halves = jax.device_get(train(config, tmp_path / "halves", show_progress=False))
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(halves), strict=True):
        np.testing.assert_array_equal(a, b)
    lines = read_scalars(tmp_path / "whole")
    first, second, *_ = lines
    names = {f"rl/{name}" for name in (*losses, "reward/colour/mean", "reward/still/std", "group/dead", "start")}
    assert names | {"rl/video/motion", "rl/video/saturation", "rl/nft/gap"} <= set(first)
    assert first["rl/nft/gap"] == 0 < second["rl/nft/gap"]
    now, old = whole.nets["student"].params, whole.nets["old"].params
    before = jax.device_get(Run.load(student).params)

    def far(a, b):
        return np.asarray([np.abs(x - y).sum() for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True)])

    assert np.mean(far(now, before) > 0) > 0.9
    assert np.mean(far(old, before) < far(now, before)) > 0.9  # the average lags behind
    assert Run.load(tmp_path / "whole").sample_videos(["a red square moving left"], frames=4).shape[1] == 4


@pytest.mark.parametrize(
    "losses, changes",
    [
        (
            dict(a="re_dmd", b="self_teacher", c="dpo_chunk", d="motion", e="kl", f="dmd"),
            dict(rl__given=2, teacher_from="a", rl__keep=2),
        ),
        (dict(a="neighbor", b="direct"), dict(rl__spread=0.3, rl__after=2, rl__window=4, student__kind="causal")),
    ],
    ids=str,
)
def test_what_losses_ask_for_is_there(losses, changes):
    """Traced, not compiled; what they compute is tested in tests/losses and test_group.py."""
    config = config_of(losses, **changes)
    stage, params = tiny.stage_of(config, LATENT, codec=CODEC)
    rng = np.random.default_rng(0)
    batch = {"text": rng.standard_normal((8, 6, 8)).astype(np.float32)}
    if "rl__given" in changes:
        batch["latents"] = rng.standard_normal((8, 8, *LATENT[1:])).astype(np.float32)
    state, carry, told, handed_on = jax.eval_shape(stage.state, params), {}, {}, []
    for part in stage.parts:
        state, metrics, carry = jax.eval_shape(part.call, state, stage.frozen, batch, carry)
        told |= metrics
        handed_on.append(carry)
    assert set(losses) <= set(told) and handed_on[0]["frames"].shape == (16, 8, *LATENT[1:])
    assert not handed_on[1]  # the episode is not kept for the critic


@pytest.mark.slow
def test_a_second_update_of_an_episode_leaves_the_policy_that_made_it(student, tmp_path):
    grpo = {"grpo": ("cm_grpo", 1.0, {"clip": 0.1})}
    still = {"still": {"reward": "flicker", "weight": 1.0}}
    config = config_of(grpo, still, student_from=student, steps=1, rl__step="stochastic", rl__epochs=2)
    train(config, tmp_path / "two", show_progress=False)
    (two,) = read_scalars(tmp_path / "two")
    assert two["rl/grpo/ratio_deviation"] > 1e-5  # far above rounding: of the second update


@pytest.mark.slow
def test_it_is_the_same_on_many_devices(student, tmp_path):
    config = config_of({"grpo": "cm_grpo"}, student_from=student, rl__step="stochastic", steps=1)
    found = []
    for shape, devices in ((dict(data=-1), jax.devices()[:1]), (dict(fsdp=2, context=2, data=2), jax.devices())):
        job = prepare_job(read_settings(config), tmp_path, make_mesh(shape, devices))
        batches = loop.Feed(job, 0)(1)
        state, metrics, _ = loop.run_parts(job.parts, 1, initial_state(job), job.stage.frozen, batches, job.mesh)
        found.append(jax.device_get((state.nets["student"].params, metrics)))
    (one, told), (many, told_by_many) = found
    assert told.keys() == told_by_many.keys()
    for name, value in told.items():
        np.testing.assert_allclose(told_by_many[name], value, rtol=1e-3, atol=1e-5, err_msg=name)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), one, many)


@pytest.mark.slow
@pytest.mark.parametrize("staleness", [0, 1])
def test_rewards_on_the_host_judge_what_was_made(staleness, student, tmp_path):
    judged = {"bright": {"reward": f"{__file__}:bright", "weight": 1.0}}
    judged["colour"] = {"reward": "colour_kept", "weight": 0.1}
    config = config_of({"nft": "nft"}, judged, student_from=student, rl__staleness=staleness, steps=3, log__every=1)
    train(config, tmp_path / "run", show_progress=False)
    lines = read_scalars(tmp_path / "run")
    assert ["rl/reward/bright/mean" in line for line in lines] == [not staleness, True, True]
    assert [line["rl/group/masked"] for line in lines] == [float(staleness), 0.0, 0.0]
    assert [line["rl/nft"] == 0 for line in lines] == [bool(staleness), False, False]
    assert all(0 < line["rl/reward/bright/mean"] < 1 for line in lines[staleness:])


def test_a_draw_of_the_recorded_step():
    plan = StepPlan(((1.0, 0.9, 0.6, 0.3), (1.0, 0.5)), "renoise")
    drawn = {how: np.stack([draw_step(jax.random.key(i), plan, how) for i in range(64)]) for how in reinforce.STEPS}
    assert set(drawn["random"][:, 0]) == {0, 1, 2, 3} and set(drawn["random"][:, 1]) == {0, 1}
    assert set(drawn["stochastic"][:, 0]) == {0, 1, 2} and set(drawn["stochastic"][:, 1]) == {0}
    assert set(drawn["last"][:, 0]) == {3} and set(drawn["last"][:, 1]) == {1}


def _own():
    student = Student(tiny.student_config(chunk=2))
    return Group(make_streamer(student, StepPlan(((1.0, 0.5),))), 12, clip=4, after=2)


def test_what_rewards_see_is_the_end_of_the_stream_and_its_beginning():
    codec = PatchCodec.fit(np.random.default_rng(0).integers(0, 255, (2, 4, 8, 8, 3), np.uint8))
    frames = jnp.broadcast_to(jnp.arange(12.0)[None, :, None, None, None], (1, 12, 2, 2, 16)) * 0.01
    plan = Plan(_own(), (2, 2, 16), 0, 3, "last", 3, 5, codec, ())
    view = plan.views(codec.params, frames, jnp.int32(2))
    np.testing.assert_array_equal(view.video_BTHWC, codec.pixels(codec.params, frames[:, 5:10]))
    np.testing.assert_array_equal(view.first_BSHWC, codec.pixels(codec.params, frames[:, :3]))


class _LooksBack(PatchCodec):
    """A codec of four frames per latent frame, each of which shows the mean of two latent frames."""

    temporal_stride = 4

    def pixels(self, params, latents_BFhwC):
        before = jnp.concatenate([latents_BFhwC[:, :1], latents_BFhwC[:, :-1]], axis=1)
        return jnp.repeat((latents_BFhwC + before) / 2, 4, axis=1)[:, 3:]


def test_a_window_of_a_codec_that_looks_back_is_decoded_with_what_was_before():
    frames = jnp.arange(12.0)[None, :, None, None, None] * jnp.ones((1, 12, 1, 1, 3))
    codec = _LooksBack(np.zeros(48, np.float32), np.eye(48, 3, dtype=np.float32), 1.0, 4)
    plan = Plan(_own(), (1, 1, 3), 3, 3, "last", 3, 5, codec, ())
    whole = codec.pixels(None, frames)
    view = plan.views(None, frames, jnp.int32(3))
    np.testing.assert_array_equal(view.video_BTHWC, whole[:, 1 + 4 * 6 : 1 + 4 * 11])  # latent frames 7 to 11


@pytest.mark.parametrize(
    "losses, changes, said",
    [
        ({"direct": "direct"}, dict(student_from=""), r"student_from is empty; stage rl starts from a trained student"),
        ({"direct": "direct"}, dict(text_dropout=0.1), r"config\.text_dropout is 0\.1, but rewards judge"),
        ({"direct": "direct"}, dict(rl__clip=3, student__chunk=2), r"config\.rl\.clip is 3, which does not divide"),
        ({"direct": "direct"}, dict(rl__frames=2), r"config\.rl\.frames is 2, less than config\.data\.frames = 4"),
        ({"direct": "direct"}, dict(rl__given=6), r"a stream of 8 frames .* has no room for config\.rl\.given = 6"),
        ({"direct": "direct"}, dict(rl__window=9), r"has no room for .* config\.rl\.window = 9"),
        ({"fm": "flow_matching"}, {}, r"config\.losses\.fm: the loss asks the stage for nothing"),
        ({"nft": "nft"}, dict(rl__group=1), r"config\.rl\.group is 1, but config\.losses\.nft compares streams"),
        ({"g": "cm_grpo"}, {}, r"config\.losses\.g takes a denoising step for a random draw; .*rl\.step=stochastic"),
        ({"n": "neighbor"}, {}, r"config\.rl\.spread is 1, but config\.losses\.n learns from streams around"),
        ({"nft": "nft"}, dict(rl__old_decay=0.0), r"config\.rl\.old_decay is 0: the averaged policy would be"),
        ({"s": "self_teacher"}, {}, r"config\.rl\.given is 0, but a loss asks for 'corrected'"),
        ({"direct": "direct"}, dict(rl__keep=2), r"config\.rl\.keep is 2, but no loss asks for 'corrected'"),
        ({"direct": "direct"}, dict(rl__staleness=1), r"config\.rl\.staleness is 1, but no reward runs on the host"),
        ({"dmd": "dmd"}, dict(rl__clip=2, teacher_from="a"), r"config\.rl\.clip is 2, but the scores see the last"),
        ({"dmd": "dmd"}, dict(distill__fake="stage1"), r"real 'joint' and fake 'stage1' are of stage dmd"),
        ({"dmd": "dmd"}, dict(distill__frames=8), r"config\.distill\.frames is 8, but stage rl does not use it"),
        ({"direct": "direct"}, dict(distill__low=0.1), r"config\.distill\.low is changed, but no loss asks for 'pair'"),
        ({"dmd": "dmd"}, {}, r"config\.rl\.rewards\.colour is optimised by no loss"),
        ({"dmd": "dmd"}, dict(distill__skip=4), r"config\.distill\.skip is 4, which leaves none of the 4 frames"),
        (
            {"direct": "direct", "kl": "kl"},
            dict(sample__sampler="euler"),
            r"config\.losses\.kl compares steps as random",
        ),
        ({"direct": "direct"}, dict(rl__spread=0.0), r"config\.rl\.spread is 0\.0; it must be above 0"),
        (
            {"g": ("cm_grpo", 1.0, {"clip": 0.1})},
            dict(rl__step="stochastic"),
            r"losses\.g\.options\.clip is 0\.1, but with config\.rl\.epochs = 1",
        ),
        (
            {"g": "cm_grpo"},
            dict(rl__step="stochastic", sample__steps=1),
            r"has a list of a single step, whose result is not random",
        ),
    ],
)
def test_keys_that_exclude_each_other(losses, changes, said):
    unused = losses == {"dmd": "dmd"} and "is optimised by no loss" not in said
    with pytest.raises(UserError, match=said):
        read_settings(config_of(losses, {} if unused else COLOUR, **changes))


@pytest.mark.parametrize(
    "reward, said",
    [
        ({}, r"config\.rl\.rewards has nothing that config\.losses\.direct could raise"),
        ({"a": {"reward": "jpeg_size", "weight": 1.0}}, r"config\.rl\.rewards\.a: 'jpeg_size' has no gradient"),
        ({"a": {"reward": "nice", "weight": 1.0}}, r"config\.rl\.rewards\.a\.reward: reward 'nice' is not known"),
        ({"a": {"reward": "seam", "weight": 1.0, "options": {"x": 1}}}, r"rewards\.a\.options: reward 'seam' has no"),
        (
            {"a": {"reward": "seam"}},
            r"config\.rl\.rewards\.a needs the keys reward and weight, options, judge, low, high may join; it has",
        ),
        ({"a": {"reward": "seam", "weight": 1.0, "low": 2.0, "high": 1.0}}, r"rewards\.a\.low: .*no value is between"),
        ({"a": {"reward": "seam", "weight": "much"}}, r"rewards\.a\.weight is 'much'; it must be a number"),
    ],
)
def test_rewards_that_cannot_be(reward, said):
    with pytest.raises(UserError, match=said):
        read_settings(config_of({"direct": "direct"}, reward))


def test_an_average_that_does_not_lag_behind_is_an_error():
    settings = read_settings(config_of({"nft": "nft"}))
    settings.kind.check_metrics(settings, 9, {"nft/gap": 0.0})  # the first updates may have taught nothing
    settings.kind.check_metrics(settings, 20, {"nft/gap": 1e-9})
    with pytest.raises(UserError, match=r"config\.rl\.old_decay: the average of the student still predicts"):
        settings.kind.check_metrics(settings, 20, {"nft/gap": 0.0})


def test_a_broken_stream_is_left_out_and_the_past_of_a_group_is_its_first_streams():
    made = {"frames": jnp.ones((6, 2, 1, 1, 1)).at[1, 1].set(jnp.nan).at[4, 0].set(jnp.inf), "x": jnp.ones((6, 3))}
    kept, sound = reinforce._sound(made, 3)
    np.testing.assert_array_equal(sound, [True, False, True, True, False, True])
    assert all(bool(jnp.all(jnp.isfinite(x))) for x in kept.values()) and float(kept["x"][1].sum()) == 0
    _, sound = reinforce._sound({"x": jnp.ones((6, 3)).at[3, 0].set(jnp.nan)}, 3)
    np.testing.assert_array_equal(sound, [True] * 3 + [False] * 3)


def test_what_is_watched_is_of_the_videos_that_are_finite():
    video = jnp.stack([jnp.zeros((3, 2, 2, 3)), jnp.full((3, 2, 2, 3), jnp.nan), jnp.ones((3, 2, 2, 3)) * 0.5])
    found = {name: float(total / count) for name, (total, count) in reinforce.looks(video.at[2, 1].add(0.25)).items()}
    assert found == pytest.approx({"motion": 0.125, "saturation": 0.0, "clipped": 0.5})
