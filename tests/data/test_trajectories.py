"""Trajectories of a teacher at a student's noise levels: the ODE, reproducible noise, resuming, the command."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from greedy_distill_jax import cli, config as configuration, prepare
from greedy_distill_jax.config_cli import read_config
from greedy_distill_jax.data.text import HashWordEncoder
from greedy_distill_jax.data.trajectories import Trajectories, write_trajectories
from greedy_distill_jax.diffusion import schedules, solvers
from greedy_distill_jax.run import Run
from greedy_distill_jax.types import UserError

SIGMAS = schedules.uniform_steps(3, 5.0)
SHAPE = (2, 3, 3, 4)
PROMPTS = ["a red square", "a blue circle", "a green triangle"]


def follow(noise, text):
    """Data is the mean of the text."""

    def velocity(x, sigma):
        data = jnp.mean(text, axis=(1, 2)).reshape(-1, 1, 1, 1, 1)
        return (x - data) / jnp.maximum(sigma, 1e-3)[..., None, None, None]

    return solvers.euler_states(velocity, noise, schedules.uniform_steps(6, 5.0), SIGMAS)


def write(output, **options):
    options = dict(sigmas=SIGMAS, latent_shape=SHAPE, plan={"teacher": "mean"}, per_prompt=2, group=2) | options
    return write_trajectories(
        PROMPTS, output, options.pop("follow", follow), HashWordEncoder(), progress=False, **options
    )


def all_of(folder):
    source = Trajectories(folder)
    return [source[index] for index in range(len(source))]


def assert_same(a, b):
    assert [x["caption"] for x in a] == [x["caption"] for x in b]
    for x, y in zip(a, b, strict=True):
        for name in ("noise", "states", "latents", "text"):
            np.testing.assert_array_equal(x[name], y[name])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("ode") / "out"
    assert write(path)["counts"] == {"train": 6}
    return path


def test_states_lie_on_the_way_from_noise_to_data(folder):
    found = all_of(folder)
    assert [x["caption"] for x in found] == [p for p in PROMPTS for _ in range(2)]
    assert Trajectories(folder).sigmas == SIGMAS and Trajectories(folder).latent_shape == SHAPE
    for x in found:
        np.testing.assert_array_equal(x["text"], HashWordEncoder()([x["caption"]])[0])
        np.testing.assert_array_equal(x["noise"], x["states"][0])
        np.testing.assert_allclose(x["latents"], np.full(SHAPE, x["text"].mean()), atol=1e-5)
        for sigma, state in zip(SIGMAS, x["states"], strict=True):  # a straight line to one point
            np.testing.assert_allclose(state, (1 - sigma) * x["latents"] + sigma * x["noise"], atol=1e-5)
    noises = np.stack([x["noise"] for x in found])
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
        Trajectories(tmp_path / "out")
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


@pytest.fixture
def teacher(tiny_teacher):
    return tiny_teacher


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


def test_the_command_follows_a_teacher(teacher, prompts, tmp_path, capsys):
    options = ["--teacher", teacher, "--student", STUDENT, "--prompts", prompts, "--output", tmp_path / "out"]
    assert run(*options, "--steps", 8, "--guidance", 3, "--batch", 2, "--seed", 7) == 0
    student = read_config(STUDENT)
    lists = configuration.sampling(student).sigmas
    source, loaded = Trajectories(tmp_path / "out"), Run.load(teacher)
    assert source.sigmas == tuple(sorted({s for row in lists for s in row}, reverse=True))
    levels = tuple(sorted({*schedules.uniform_steps(8, student.sample.shift), *source.sigmas}, reverse=True))
    text, null = loaded.text([PROMPTS[1]]), loaded.text([""])

    def velocity(x, sigma):
        c, u = (loaded.model(loaded.params, x, sigma, rows) for rows in (text, null))
        return u + 3.0 * (c - u)

    noise = jax.random.normal(jax.random.fold_in(jax.random.key(7), 1), (1, *loaded.latent_shape), jnp.float32)
    end, states = jax.jit(lambda noise: solvers.euler_states(velocity, noise, levels, source.sigmas))(noise)
    np.testing.assert_array_equal(source[1]["noise"], noise[0])
    np.testing.assert_allclose(source[1]["states"], states[:, 0], atol=1e-4)
    np.testing.assert_allclose(source[1]["latents"], end[0], atol=1e-4)
    assert "2 trajectories at noise levels 1, " in capsys.readouterr().out
    assert source.info["plan"]["shift"] == student.sample.shift


@pytest.mark.parametrize(
    "more, message",
    [
        (["--student", "configs/quickstart.py:teacher"], "configures a teacher"),
        (["--student", "configs/none.py"], "no such file"),
        (["--steps", "0"], "--steps 0"),
        (["--per-prompt", "0"], "--per-prompt 0"),
        (["--prompts", "/nowhere.txt"], "cannot be read"),
        (["--teacher", "/nowhere"], "holds no run"),
        (["--model", "/nowhere"], "not allowed with argument"),
        (["--text", "/nowhere"], "neither a folder made by prepare text"),
    ],
)
def test_bad_input_is_one_line_and_code_2(teacher, prompts, tmp_path, capsys, more, message):
    options = ["--teacher", teacher, "--student", STUDENT, "--prompts", prompts, "--output", tmp_path / "out"]
    assert run(*options, "--steps", 4, *more) == 2
    assert message in capsys.readouterr().err.splitlines()[-1] and not (tmp_path / "out").exists()
