"""Trajectories of a teacher as data: stage "ode", and stage 2 with a regression on them beside its own videos."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from greedy_distill_jax import losses
from greedy_distill_jax.codecs.patch import PatchCodec
from greedy_distill_jax.config import read_settings
from greedy_distill_jax.data.sources.registry import load_source
from greedy_distill_jax.data.sources.trajectories import write_trajectories
from greedy_distill_jax.diffusion import noise_levels, solvers
from greedy_distill_jax.errors import UserError
from greedy_distill_jax.testing import tiny
from greedy_distill_jax.text.hashed_words import HashWordEncoder
from greedy_distill_jax.train import train
from greedy_distill_jax.training.metrics import read_scalars

LATENT = (4, 4, 4, 16)
TERM = dict(loss="ode", weight=0.5, options=dict(motion=1.0))


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A folder of trajectories at the levels of two steps."""
    folder = tmp_path_factory.mktemp("trajectories") / "ode"
    settings = read_settings(tiny.train_config("teacher_forcing", sample__steps=2))
    sigmas, steps = settings.plan.sigmas[0], noise_levels.uniform_steps(4, settings.shift)

    def follow(noise, text):
        return solvers.euler_states(lambda x, sigma: x, noise, steps, sigmas)

    encoder, codec = HashWordEncoder(6, 8), load_source("moving_shapes")[1]
    assert isinstance(codec, PatchCodec) and set(sigmas) <= set(steps)
    prompts = [f"a red square number {i}" for i in range(8)]
    write_trajectories(
        prompts, folder, follow, encoder, codec, sigmas=sigmas, latent_shape=LATENT, plan={}, progress=False
    )
    return f"ode:{folder}"


def test_the_student_trains_on_stored_trajectories(stored, tmp_path):
    config = tiny.train_config("ode", steps=2, data__source=stored, sample__steps=2)
    del config.losses["flow_matching"]
    config.losses.ode = TERM
    state = train(config, tmp_path / "run", show_progress=False)
    last = read_scalars(tmp_path / "run")[-1]
    assert int(state.step) == 2 and last["ode/ode/first_level"] > 0 and last["ode/ode/motion"] > 0
    with config.unlocked():
        config.sample.steps = 3
    with pytest.raises(UserError, match=r"config\.sample asks the student at .* too"):
        train(config, tmp_path / "other", show_progress=False)
    config.data.source = "moving_shapes"
    with pytest.raises(UserError, match="which holds no trajectories"):
        train(config, tmp_path / "other", show_progress=False)


# --- stage 2 ----------------------------------------------------------------------------------------------------------


def stage2(**changes):
    still = dict(optimizer__warmup=0, critic__optimizer__warmup=0)
    config = tiny.train_config("dmd", **{"sample__sampler": "renoise", "sample__steps": 2, **still, **changes})
    config.losses.ode = TERM
    return config


def batch_of(seed=0):
    keys = jax.random.split(jax.random.key(seed), 3)
    return {
        "text": jax.random.normal(keys[0], (2, 6, 8)),
        "latents": jax.random.normal(keys[1], (2, *LATENT)),
        "states": jax.random.normal(keys[2], (2, 2, *LATENT)),
    }


@pytest.mark.parametrize(
    "changes",
    [
        dict(data__accumulate=2),
        dict(distill__pg="actor_critic", distill__epochs=2, distill__fake="self_sg", distill__generator_every=1),
    ],
    ids=str,
)
def test_its_loss_gets_the_samples_and_the_others_the_generated_video(changes):
    seen = {}

    def watched(net, batch, key, *, samples, per_frame=False, group=1):
        found = {name: samples[name].shape for name in ("latents", "states", "levels", "text")}
        seen.update(found, options=(per_frame, group))
        at = (samples["history"].frames_BTHWC - samples["latents"], batch["action"] - batch["latents"])
        v = net(samples["latents"], samples["levels"][:, :1], samples)
        metrics = {"history": jnp.mean(jnp.abs(at[0])), "own": jnp.mean(jnp.abs(at[1]))}
        apart = jnp.mean(jnp.abs(batch["latents"] - samples["latents"]))
        return jnp.mean(jnp.square(v), axis=(1, 2, 3, 4)), {**metrics, "apart": apart}

    losses.register("watched", watched)
    config = stage2(data__batch=2, student__chunk=2, **changes)
    config.losses.ode = dict(loss="watched", weight=1.0, options={})
    stage, params = tiny.stage_of(config, LATENT)
    state = jax.jit(stage.state)(params)

    @jax.jit  # what only the update needs is not compiled
    def found(*args):
        metrics = tiny.call_of(stage.parts[0])(*args)[1]
        return {name: metrics[f"ode/{name}"] for name in ("history", "own", "apart")}

    metrics = found(state, stage.frozen, batch_of())
    count = 2 // config.data.accumulate
    assert seen["latents"] == (count, *LATENT) and seen["states"] == (count, 2, *LATENT)
    assert seen["levels"] == (count, 2) and seen["text"] == (count, 6, 8)
    assert seen["options"] == (True, 2)  # the student's chunk, though the teacher's score is bidirectional
    assert float(metrics["history"]) == 0 and float(metrics["own"]) < 1e-4 < float(metrics["apart"])


def test_without_such_a_loss_the_data_stays_prompts():
    config = stage2()
    assert read_settings(config).kind.batch_shapes(read_settings(config), LATENT).keys() == {
        "text",
        "latents",
        "states",
    }
    del config.losses["ode"]
    settings = read_settings(config)
    assert settings.kind.batch_shapes(settings, LATENT).keys() == {"text"}
    assert settings.kind.check_source(settings, None) is None


@pytest.mark.slow
def test_a_run_with_a_motion_head_too_goes_on_bit_by_bit(
    stored, tiny_teacher, tiny_student, same_programs, tmp_path, capsys
):
    runs = dict(teacher_from=str(tiny_teacher), student_from=str(tiny_student), motion_head__optimizer__warmup=0)
    runs |= dict(motion_head__width=8, motion_head__layers=1, steps=4, checkpoint__every=2, data__source=stored)

    def config(**changes):
        config = stage2(**{**runs, **changes})
        config.losses.motion = dict(loss="motion_head", weight=0.5, options={})
        return config

    whole = train(config(), tmp_path / "whole", show_progress=False)
    assert "no gradient" not in capsys.readouterr().err
    shutil.copytree(tmp_path / "whole", tmp_path / "halves")  # as if it had been killed after it saved step 2
    shutil.rmtree(tmp_path / "halves" / "checkpoints" / "4")
    halves = train(config(), tmp_path / "halves", show_progress=False)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(halves), strict=True):
        np.testing.assert_array_equal(a, b)
    lines = read_scalars(tmp_path / "whole")
    assert lines[0]["dmd/dmd"] > 0 and lines[0]["dmd/ode"] > 0 and lines[0]["dmd/ode/motion"] > 0
    told = ["dmd/motion_head/contrast" in line for line in lines]
    assert told == [True, False, True, False]  # as often as the student
    with pytest.raises(UserError, match=r"was started with config\.motion_head\.width = 8, not 16"):
        train(config(motion_head__width=16, steps=6), tmp_path / "whole", show_progress=False)
    without = config(steps=6)
    del without.losses["motion"]
    with pytest.raises(UserError, match=r"another architecture: .*motion_head"):
        train(without, tmp_path / "whole", show_progress=False)
    with pytest.raises(UserError, match=r"config\.sample asks the student at .* too"):
        train(config(sample__steps=3), tmp_path / "other", show_progress=False)
    with pytest.raises(UserError, match=r"'moving_shapes', which holds no trajectories; make some"):
        train(config(data__source="moving_shapes"), tmp_path / "other", show_progress=False)
    assert not (tmp_path / "other").exists()


def test_other_stages_have_no_samples():
    config = tiny.train_config("teacher_forcing")
    config.losses.ode = TERM
    with pytest.raises(UserError, match=r"config\.losses\.ode: 'ode' asks for 'samples' of stage teacher_forcing"):
        read_settings(config)
    config = tiny.train_config("dmd", student_from="a run")
    config.losses = {"ode": TERM}
    with pytest.raises(UserError, match=r"config\.losses has no loss that asks for scores"):
        read_settings(config)
