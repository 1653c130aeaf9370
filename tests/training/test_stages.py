"""What joins training from outside the package: a stage with parts that hand on, losses that ask for networks."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from greedy_distill_jax import losses
from greedy_distill_jax.config import base, read_settings, register_stage, stages as registry
from greedy_distill_jax.distribution.mesh import make_mesh
from greedy_distill_jax.errors import UserError
from greedy_distill_jax.ranges import Fraction
from greedy_distill_jax.runs.run import Run
from greedy_distill_jax.storage.checkpoint import Checkpointer, load_meta
from greedy_distill_jax.testing import tiny
from greedy_distill_jax.train import train
from greedy_distill_jax.training import nets
from greedy_distill_jax.training.job import prepare_job
from greedy_distill_jax.training.metrics import read_scalars
from greedy_distill_jax.training.sources import Wanted
from greedy_distill_jax.training.stages.base import Network, Part, Stage, StageKind, always, own_update, returned
from greedy_distill_jax.training.update import update_net, value_and_gradients

LATENT = (4, 4, 4, 16)


# --- a stage of one's own: rollout, a reward outside of jit, an update ------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Bright:
    """Keys of the stage."""

    target: Fraction = 0.5  # the mean that is rewarded


class RewardedStage(StageKind):
    """A teacher whose loss is weighted by a reward that a host part computes between two jitted ones."""

    trains = "teacher"
    keys = {"bright": Bright}  # noqa: RUF012

    def check(self, settings):
        """Any videos will do."""

    def terms(self, settings):
        return ()

    def wanted(self, settings):
        return {"teacher": Wanted("teacher_from", settings.wan)}

    def build(self, settings, inputs):
        model, update = self.model(settings), own_update(settings, settings.steps)

        def sample(state, frozen, batch, carry):
            key = jax.random.fold_in(jax.random.key(settings.seed), state.step)
            noise = jax.random.normal(key, batch["latents"].shape)
            net = nets.teacher_net(model, state.nets["teacher"].params)
            return state, {}, {"made": noise - net(noise, jnp.ones((len(noise), 1)), batch)}

        def reward(state, frozen, batch, carry):
            assert state is None and isinstance(carry["made"], np.ndarray), "a host part sees arrays, and no state"
            found = -np.abs(carry["made"].mean(axis=(1, 2, 3, 4)) - settings.own["bright"].target)
            return None, {"reward": np.float32(found.mean())}, {**carry, "reward": found.astype(np.float32)}

        def learn(state, frozen, batch, carry):
            def objective(params):
                net = nets.teacher_net(model, params)
                x = carry["made"]
                v = net(x, jnp.ones((len(x), 1)), batch)
                loss = jnp.mean(carry["reward"] * jnp.mean(jnp.square(v), axis=(1, 2, 3, 4)))
                return loss, {"weighted": loss}

            (loss, metrics), grads = value_and_gradients(objective, state.nets["teacher"].params)
            state, sizes = update_net(state, "teacher", update, grads)
            return state, {"loss": loss, **metrics, **sizes}, carry

        parts = (
            Part("sample", always, sample),
            Part("reward", always, reward, host=True),
            Part("learn", always, learn),
        )
        return Stage({"teacher": Network(model, update, start_from=("teacher",))}, {}, parts)


@pytest.fixture
def rewarded(monkeypatch):
    monkeypatch.setattr(registry, "_STAGES", dict(registry._STAGES))
    register_stage("rewarded", RewardedStage())


def test_a_stage_from_outside_trains_resumes_and_samples(rewarded, tmp_path):
    config = tiny.train_config("rewarded", steps=3, checkpoint__every=2)
    state = train(config, tmp_path / "run", show_progress=False)
    assert int(state.step) == 3 and set(state.nets) == {"teacher"}
    lines = read_scalars(tmp_path / "run")
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert all({"rewarded/reward", "rewarded/loss", "rewarded/grad_norm"} <= set(line) for line in lines)
    config.steps = 4
    assert int(train(config, tmp_path / "run", show_progress=False).step) == 4
    run = Run.load(tmp_path / "run")
    assert run.sample_videos(["a red square moving left"], frames=4).shape == (1, 4, 16, 16, 3)


@pytest.mark.parametrize(
    "out, said",
    [
        ((None, {}), r"part learn returned a tuple of 2; return \(state, metrics, carry\)"),
        (None, "part learn returned a NoneType"),
        ((None, {}, ()), "part learn returned a tuple of 3"),
        ((None, {"speed": "fast"}, {}), "metric 'speed' as a str; a metric is one number"),
        ((None, {"speed": np.ones(3)}, {}), r"metric 'speed' as \[3\]"),
    ],
)
def test_what_a_part_must_return(out, said):
    part = Part("learn", always, None)
    with pytest.raises(UserError, match=said):
        returned(part, out)
    good = None, {"speed": np.float32(1), "jax": jnp.bfloat16(2), "python": 3}, {"made": 1}
    assert returned(part, good) is good


@pytest.mark.parametrize("kind, said", [(RewardedStage, "the class RewardedStage"), ({}, "a dict")])
def test_what_is_no_stage(rewarded, kind, said):
    register_stage("wrong", kind)
    with pytest.raises(UserError, match=f"stage 'wrong' is {said}; register an instance"):
        registry.kind_of("wrong")


def test_its_keys_are_keys_of_the_configuration(rewarded):
    config = base()
    config.stage = "rewarded"
    config.bright.target = -1.0
    with pytest.raises(UserError, match=r"config\.bright\.target is -1\.0; it must be from 0 to 1"):
        read_settings(config)
    config.bright.target, config.stage = 0.75, "teacher"
    with pytest.raises(UserError, match=r"config\.bright\.target is 0\.75, but stage teacher does not use it"):
        read_settings(config)


# --- networks and gradients that losses ask for -----------------------------------------------------------------------


def towards(net, batch, key, *, target, real):
    """Asks for the average of the network itself and for the frozen teacher."""
    x, sigma = batch["latents"], jnp.full((len(batch["latents"]), 1), 0.5)
    v = net(x, jnp.broadcast_to(sigma, x.shape[:2]), batch)
    aims = [jax.lax.stop_gradient(other(x, sigma, batch)) for other in (target, real)]
    return sum(jnp.mean(jnp.square(v - aim), axis=(1, 2, 3, 4)) for aim in aims), {}


def stopped(net, batch, key):
    """A number that trains nothing, as published motion losses are."""
    x = batch["latents"]
    v = jax.lax.stop_gradient(net(x, jnp.ones((len(x), 1)), batch))
    return jnp.mean(jnp.square(v), axis=(1, 2, 3, 4)), {}


def test_a_stage_on_data_offers_the_average_and_the_frozen_teacher(tiny_teacher, tmp_path):
    losses.register("towards", towards)
    config = tiny.train_config("teacher_forcing", steps=1, teacher_from=str(tiny_teacher))
    config.losses.towards = dict(loss="towards", weight=0.5, options={})
    train(config, tmp_path / "run", show_progress=False)
    assert read_scalars(tmp_path / "run")[-1]["teacher_forcing/towards"] > 0
    assert set(load_meta(tmp_path / "run" / "checkpoints")["sources"]) == {"teacher_from"}
    config.teacher_from = ""
    with pytest.raises(
        UserError, match=r"config\.teacher_from is empty, but a loss that asks for 'real' needs that network"
    ):
        train(config, tmp_path / "other", show_progress=False)


def test_a_term_without_a_gradient_is_refused_before_the_first_update(tmp_path):
    losses.register("stopped", stopped)
    config = tiny.train_config(steps=1)
    config.losses.motion = dict(loss="stopped", weight=1.0, options={})
    with pytest.raises(UserError, match=r"config\.losses\.motion has no gradient: it cannot train anything"):
        train(config, tmp_path / "run", show_progress=False)
    assert not (tmp_path / "run").exists()


def test_parameters_that_no_loss_reaches_are_named(tmp_path, capsys):
    def patches(net, batch, key):
        """Reaches the student only through frames that see nothing before them."""
        x = batch["latents"][:, :1]
        first = {**batch, "history": batch["history"]._replace(frames_BTHWC=x, sigma_BT=jnp.zeros((len(x), 1)))}
        v = net(x, jnp.full((len(x), 1), 0.5), first)
        return jnp.mean(jnp.square(v), axis=(1, 2, 3, 4)), {}

    losses.register("patches", patches)
    config = tiny.train_config("teacher_forcing", steps=1, student__fusion="add")
    del config.losses["flow_matching"]
    config.losses.patches = dict(loss="patches", weight=1.0, options={})
    mesh = make_mesh({"data": -1})
    prepare_job(read_settings(config), tmp_path / "run", mesh)  # it says so before the first update
    said = capsys.readouterr().err
    for line in (line for line in said.splitlines() if line.startswith("warning: part")):
        assert "no loss trains" in line
    prepare_job(read_settings(tiny.train_config(steps=1)), tmp_path / "whole", mesh)
    assert "no loss trains" not in capsys.readouterr().err, "every parameter of a teacher learns from flow matching"


def test_a_mistake_in_a_loss_of_ones_own_keeps_its_traceback(tmp_path):
    def wrong(net, batch, key):
        return batch["videos"], {}

    losses.register("wrong", wrong)
    config = tiny.train_config(steps=1)
    config.losses.mine = dict(loss="wrong", weight=1.0, options={})
    with pytest.raises(KeyError, match="videos"):
        train(config, tmp_path / "run", show_progress=False)


# --- stage 2 from prompts alone ---------------------------------------------------------------------------------------


def test_prompts_alone_are_enough_for_stage_2(tiny_teacher, tiny_student, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red square moving left\na blue circle moving up\n" * 4)
    source = f"prompts:{tmp_path / 'prompts.txt'}"
    runs = dict(teacher_from=str(tiny_teacher), student_from=str(tiny_student))
    warmups = dict(distill__critic_warmup=1, optimizer__warmup=0)  # the program of test_distillation
    config = tiny.train_config("dmd", steps=2, data__source=source, **runs, **warmups)
    state = train(config, tmp_path / "run", show_progress=False)
    assert int(state.step) == 2
    with pytest.raises(UserError, match="holds prompts alone"):
        train(tiny.train_config(steps=1, data__source=source), tmp_path / "other", show_progress=False)


def test_an_older_checkpoint_is_refused_in_one_line(tmp_path):
    with Checkpointer(tmp_path / "checkpoints") as checkpointer:
        checkpointer.save(1, {"params": jnp.zeros(1)}, {"layout": 1, "config": "{}"})
    with pytest.raises(UserError, match="is in checkpoint layout 1, this version reads layout 2; use the version"):
        load_meta(tmp_path / "checkpoints")
