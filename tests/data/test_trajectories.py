"""Trajectories of a teacher at a student's noise levels: the ODE, reproducible noise, resuming, the command."""

from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from greedy_distill_jax import cli, prepare
from greedy_distill_jax.cli.config_flags import read_config
from greedy_distill_jax.config import read_settings
from greedy_distill_jax.data.loader import make_loader
from greedy_distill_jax.data.sources.registry import load_source
from greedy_distill_jax.data.sources.trajectories import TRAJECTORIES, write_trajectories
from greedy_distill_jax.diffusion import noise_levels, solvers
from greedy_distill_jax.errors import UserError
from greedy_distill_jax.runs import ode
from greedy_distill_jax.runs.run import Run
from greedy_distill_jax.storage.sharded import ShardedSource
from greedy_distill_jax.text.hashed_words import HashWordEncoder
from greedy_distill_jax.text.table import TextTable

SIGMAS = noise_levels.uniform_steps(3, 5.0)
SHAPE = (2, 3, 3, 4)
CODEC = load_source("moving_shapes")[1]
PROMPTS = ["a red square", "a blue circle", "a green triangle"]


def follow(noise, text):
    """Data is the mean of the text."""

    def velocity(x, sigma):
        data = jnp.mean(text, axis=(1, 2)).reshape(-1, 1, 1, 1, 1)
        return (x - data) / jnp.maximum(sigma, 1e-3)[..., None, None, None]

    return solvers.euler_states(velocity, noise, noise_levels.uniform_steps(6, 5.0), SIGMAS)


def write(output, **options):
    options = dict(sigmas=SIGMAS, latent_shape=SHAPE, plan={"teacher": "mean"}, per_prompt=2, group=2) | options
    return write_trajectories(
        PROMPTS, output, options.pop("follow", follow), HashWordEncoder(), CODEC, progress=False, **options
    )


def all_of(folder):
    source = ShardedSource(folder, TRAJECTORIES)
    return [source[index] for index in range(len(source))]


def assert_same(a, b):
    assert [x["caption"] for x in a] == [x["caption"] for x in b]
    for x, y in zip(a, b, strict=True):
        for name in ("states", "latents", "text"):
            np.testing.assert_array_equal(x[name], y[name])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("ode") / "out"
    assert write(path)["counts"] == {"train": 6}
    return path


def test_states_lie_on_the_way_from_noise_to_data(folder):
    found = all_of(folder)
    assert [x["caption"] for x in found] == [p for p in PROMPTS for _ in range(2)]
    assert ShardedSource(folder, TRAJECTORIES).levels == SIGMAS
    for x in found:
        np.testing.assert_array_equal(x["text"], HashWordEncoder()([x["caption"]])[0])
        np.testing.assert_allclose(x["latents"], np.full(SHAPE, x["text"].mean()), atol=1e-5)
        for sigma, state in zip(SIGMAS, x["states"], strict=True):  # a straight line to one point
            np.testing.assert_allclose(state, (1 - sigma) * x["latents"] + sigma * x["states"][0], atol=1e-5)
    noises = np.stack([x["states"][0] for x in found])
    assert len(np.unique(noises)) == noises.size and abs(noises.mean()) < 0.2 and abs(noises.std() - 1) < 0.1


@pytest.mark.parametrize("options", [dict(batch=2), dict(batch=5, group=6), dict(share=(0, 1), group=4, batch=3)])
def test_noise_does_not_depend_on_how_the_work_is_cut(folder, tmp_path, options):
    write(tmp_path / "out", **options)
    assert_same(all_of(tmp_path / "out"), all_of(folder))


def test_interrupted_and_shared_work_gives_the_same(folder, tmp_path):
    calls = []

    def until_the_fourth(noise, text):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return follow(noise, text)

    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "out", follow=until_the_fourth)
    with pytest.raises(UserError, match="not finished"):
        ShardedSource(tmp_path / "out", TRAJECTORIES)
    assert write(tmp_path / "out", share=(0, 2)) is None
    assert write(tmp_path / "out", share=(1, 2))["counts"] == {"train": 6}
    assert_same(all_of(tmp_path / "out"), all_of(folder))
    with pytest.raises(UserError, match="begun with seed = 0, not 1"):
        write(tmp_path / "out", seed=1)


def test_what_is_not_finite_is_refused(tmp_path):
    with pytest.raises(UserError, match="video of 'a red square' is not finite"):
        write(tmp_path / "out", follow=lambda noise, text: follow(noise * jnp.nan, text))
    with pytest.raises(UserError, match=r"begin at 0\.9; a trajectory begins with noise"):
        write(tmp_path / "out", sigmas=(0.9, 0.5))


def test_a_training_stage_reads_them(folder):
    """The batch entries of a regression: noisy states at the levels, where they end, the text as it was stored."""
    source, codec = load_source(f"ode:{folder}", frames=2)
    assert source.levels == SIGMAS and codec.channels == CODEC.channels
    encoder = HashWordEncoder()
    batch = next(make_loader(source, codec=codec, text_encoder=encoder, global_batch=3, seed=0, shuffle=False))
    first = [source[index] for index in range(3)]
    for name in ("latents", "states", "text"):
        np.testing.assert_array_equal(batch[name], [x[name] for x in first])
    assert batch["states"].shape == (3, len(SIGMAS), *SHAPE)
    np.testing.assert_array_equal(batch["text"], encoder([x["caption"] for x in first]))
    with pytest.raises(UserError, match="holds frames=2, asked for 8"):
        load_source(f"ode:{folder}", frames=8)
    with pytest.raises(UserError, match="split='held_out' is unknown"):
        load_source(f"ode:{folder}", "held_out")


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("ode_prompts") / "prompts.txt"
    path.write_text("\n".join(PROMPTS[:2]))
    return path


STUDENT = "configs/quickstart.py:stage2"


def run(*arguments):
    with pytest.raises(SystemExit) as end:
        cli.run(prepare.main, ["ode", *map(str, arguments)])
    return end.value.code


def test_the_command_follows_a_teacher(tiny_teacher, prompts, tmp_path, capsys):
    options = ["--teacher", tiny_teacher, "--student", STUDENT, "--prompts", prompts, "--output", tmp_path / "out"]
    assert run(*options, "--steps", 8, "--guidance", 3, "--batch", 2, "--seed", 7) == 0
    student = read_settings(read_config(STUDENT), imagine_runs=True)
    lists = student.plan.sigmas
    source, loaded = ShardedSource(tmp_path / "out", TRAJECTORIES), Run.load(tiny_teacher)
    assert source.levels == tuple(sorted({s for row in lists for s in row}, reverse=True))
    levels = tuple(sorted({*noise_levels.uniform_steps(8, student.sample.shift), *source.levels}, reverse=True))
    text, null = loaded.text([PROMPTS[1]]), loaded.text([""])

    def velocity(x, sigma):
        c, u = (loaded.model(loaded.params, x, sigma, rows) for rows in (text, null))
        return u + 3.0 * (c - u)

    noise = jax.random.normal(jax.random.fold_in(jax.random.key(7), 1), (1, *loaded.latent_shape), jnp.float32)
    end, states = jax.jit(lambda noise: solvers.euler_states(velocity, noise, levels, source.levels))(noise)
    np.testing.assert_array_equal(source[1]["states"][0], noise[0])
    np.testing.assert_allclose(source[1]["states"], states[:, 0], atol=1e-4)
    np.testing.assert_allclose(source[1]["latents"], end[0], atol=1e-4)
    assert "2 trajectories at noise levels 1, " in capsys.readouterr().out
    assert source.info["plan"]["shift"] == student.sample.shift


def test_the_plan_tells_models_and_encoders_apart(prompts, tmp_path, monkeypatch):
    def plan(model, encoder):
        monkeypatch.setattr(ode, "_of_folder", lambda *_, **__: mock.Mock(encoder=encoder))
        return ode.follow_teacher(prompts, tmp_path, sigmas=(1.0,), shift=1.0, model=model, text="x", negative="")

    def encoder(fingerprint):
        return TextTable(mock.Mock(wraps=HashWordEncoder(), text_len=2, text_dim=3, fingerprint=fingerprint), [""])

    monkeypatch.setattr(ode, "write_trajectories", lambda *_, plan, **__: {k: plan[k] for k in ("teacher", "text")})
    for name, data in (("a", b"1"), ("renamed", b"1"), ("retrained", b"2")):
        (tmp_path / name / "transformer").mkdir(parents=True)
        (tmp_path / name / "transformer" / "x.safetensors").write_bytes(data)
    one = plan(tmp_path / "a", encoder("e"))
    assert one == plan(tmp_path / "renamed", encoder("e")) and one["text"] == "e"
    assert one != plan(tmp_path / "retrained", encoder("e")) and one != plan(tmp_path / "a", encoder("f"))


@pytest.mark.parametrize(
    "more, message",
    [
        (["--student", "configs/quickstart.py:teacher"], "configures a teacher"),
        (["--student", "configs/none.py"], "no such file"),
        (["--steps", "0"], "--steps: it is 0; it must be from 1 to 1000"),
        (["--per-prompt", "0"], "--per-prompt: it is 0; it must be at least 1"),
        (["--prompts", "/nowhere.txt"], "--prompts: /nowhere.txt cannot be read"),
        (["--teacher", "/nowhere"], "--teacher: /nowhere holds no run"),
        (["--model", "/nowhere"], "not allowed with argument"),
        (["--text", "/nowhere"], "--text: /nowhere is neither a folder made by prepare text"),
    ],
)
def test_bad_input_is_one_line_and_code_2(tiny_teacher, prompts, tmp_path, capsys, more, message):
    options = ["--teacher", tiny_teacher, "--student", STUDENT, "--prompts", prompts, "--output", tmp_path / "out"]
    assert run(*options, "--steps", 4, *more) == 2
    assert message in capsys.readouterr().err.splitlines()[-1] and not (tmp_path / "out").exists()
