"""The training loop: resume, interruption, divergence, losses of one's own, bad input."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from greedy_distill_jax import losses, train as training
from greedy_distill_jax.config import read_settings
from greedy_distill_jax.errors import Diverged, Stopped, UserError
from greedy_distill_jax.runs.run import Run
from greedy_distill_jax.storage.checkpoint import Checkpointer, load_meta
from greedy_distill_jax.testing import tiny
from greedy_distill_jax.train import train
from greedy_distill_jax.training import job, loop
from greedy_distill_jax.training.metrics import read_scalars
from greedy_distill_jax.training.stop import Stop
from tests.conftest import exit_code

CONFIG = """
import pathlib, time
from greedy_distill_jax.training.metrics import MetricWriter
from greedy_distill_jax.testing.tiny import train_config
write = MetricWriter.scalars
def scalars(self, step, *args):
    write(self, step, *args)
    if step == {hold}:
        pathlib.Path({held!r}).touch()
        while pathlib.Path({held!r}).exists():
            time.sleep(0.01)
MetricWriter.scalars = scalars
def get_config(stage="teacher"):
    changes = dict(optimizer__name="muon", optimizer__final=0.05)  # its state, and a rate that decays
    return train_config(stage, steps=40, checkpoint__every=5, **changes)
"""


def _leaves(directory, step=None):
    with Checkpointer(directory / "checkpoints", read_only=True) as checkpointer:
        tree = checkpointer.restore_subtree(step, "")
    return {jax.tree_util.keystr(path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(tree)}


def _assert_identical(a, b):
    assert a.keys() == b.keys() and len(a) > 50
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


class _Process:
    """A training command in a child process, which waits at step ``hold`` for a signal."""

    def __init__(self, tmp_path, workdir, env, hold=None):
        config, self.held = tmp_path / "config.py", tmp_path / "held"
        config.write_text(CONFIG.format(hold=hold, held=str(self.held)))
        arguments = [sys.executable, "-m", "greedy_distill_jax.train", f"--config={config}", f"--workdir={workdir}"]
        self.process = subprocess.Popen(arguments, env=env, stderr=subprocess.PIPE, text=True)

    def signal(self, number):
        while not self.held.exists():
            assert self.process.poll() is None, f"it did not come so far: {self.process.communicate()[1]}"
            time.sleep(0.01)
        self.process.send_signal(number)
        self.held.unlink()

    def finish(self):
        error = self.process.communicate()[1]
        return self.process.returncode, error


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, subprocess_env):
    root = tmp_path_factory.mktemp("undisturbed")
    code, error = _Process(root, root / "run", subprocess_env).finish()
    assert code == 0, error
    return _leaves(root / "run")


def test_an_interrupted_run_ends_bit_identical(undisturbed, tmp_path, subprocess_env):
    """After every interruption the same command goes on; a difference that one of them made would last to the end."""
    workdir, kept = tmp_path / "run", 0
    for number, step in ((signal.SIGKILL, 7), (signal.SIGKILL, 15), (signal.SIGTERM, 22)):
        run, before = _Process(tmp_path, workdir, subprocess_env, hold=step), kept
        run.signal(number)
        code, error = run.finish()
        with Checkpointer(workdir / "checkpoints", read_only=True) as checkpointer:
            kept = checkpointer.latest_step() or 0
        if number == signal.SIGTERM:
            assert code == 0, error
            assert step <= kept < 40 and f"saved step {kept} of 40" in error
        else:
            assert code == -signal.SIGKILL and kept % 5 == 0 and before <= kept <= step, error
    assert _Process(tmp_path, workdir, subprocess_env).finish()[0] == 0
    _assert_identical(_leaves(workdir), undisturbed)
    steps = [line["step"] for line in read_scalars(workdir)]
    assert steps == list(range(1, 41)), "scalars.jsonl has a hole or a duplicate"


@pytest.mark.parametrize("number, ends", [(signal.SIGTERM, Stopped), (signal.SIGINT, KeyboardInterrupt)])
def test_a_signal_in_the_last_update_ends_what_would_follow(number, ends, tmp_path, monkeypatch):
    """The run is whole, and whoever called ``train`` (the quickstart, a benchmark) does not begin the next one."""

    def begins(stop, step):
        if step == 2:
            os.kill(os.getpid(), number)
        return True

    monkeypatch.setattr(Stop, "begins", begins)
    config = tiny.train_config("teacher", steps=2)
    with pytest.raises(ends):
        train(config, tmp_path / "run", show_progress=False)
    with Checkpointer(tmp_path / "run" / "checkpoints", read_only=True) as checkpointer:
        assert checkpointer.latest_step() == 2
    monkeypatch.undo()
    assert int(train(config, tmp_path / "run", show_progress=False).step) == 2


def test_stages_follow_each_other_and_sample(tiny_teacher, tmp_path):
    shutil.copytree(tiny_teacher, tmp_path / "teacher")
    config = tiny.train_config("teacher_forcing", teacher_from=str(tmp_path / "teacher"), log__samples_every=6)
    train(config, tmp_path / "student", show_progress=False)
    meta = load_meta(tmp_path / "student" / "checkpoints")
    assert meta["data_position"] == 6 * 8 and meta["stage"] == "teacher_forcing" and meta["train_cpu_s"] > 0
    teacher, student = (Run.load(tmp_path / name) for name in ("teacher", "student"))
    for run, frames in ((teacher, 4), (student, 9)):
        video = run.sample_videos(["a red square moving left", ""], frames=frames, seed=1)
        assert video.shape == (2, frames, 16, 16, 3) and video.dtype == np.uint8
        np.testing.assert_array_equal(video, run.sample_videos(["a red square moving left", ""], frames=frames, seed=1))
    events = [p for p in (tmp_path / "student").iterdir() if "tfevents" in p.name]
    assert events and events[0].stat().st_size > 2000  # scalars and GIFs

    # The student started from its teacher: at update 0 its SDD blocks are the teacher's.
    fresh = student.model.from_teacher(jax.random.key(0), teacher.params, (4, 4, 4, 16))
    np.testing.assert_array_equal(
        fresh["sdd"]["blocks"]["ffn"]["up"]["kernel"], teacher.params["blocks"]["ffn"]["up"]["kernel"]
    )
    picked = np.asarray(teacher.params["blocks"]["self_attn"]["k"]["kernel"])
    np.testing.assert_array_equal(fresh["sdd"]["blocks"]["self_attn"]["z_k"]["kernel"], picked)
    np.testing.assert_array_equal(fresh["etm"]["blocks"]["self_attn"]["k"]["kernel"], picked[:1])

    with pytest.raises(UserError, match=r"another architecture: ffn_dim 32 against 40"):
        train(
            tiny.train_config("teacher_forcing", teacher_from=str(tmp_path / "teacher"), model__ffn_dim=40),
            tmp_path / "x",
        )
    with pytest.raises(UserError, match="not a teacher"):
        train(tiny.train_config("teacher_forcing", teacher_from=str(tmp_path / "student")), tmp_path / "y")
    with pytest.raises(UserError, match="architecture"):
        train(tiny.train_config(model__ffn_dim=40, steps=9), tmp_path / "teacher", show_progress=False)
    with pytest.raises(UserError, match=r"started with config.data.batch = 8, not 16"):
        train(tiny.train_config(data__batch=16, steps=9), tmp_path / "teacher", show_progress=False)
    with pytest.raises(UserError, match=r"started with config.seed = 0, not 1"):
        train(tiny.train_config(seed=1, steps=9), tmp_path / "teacher", show_progress=False)
    assert not (tmp_path / "x").exists() and not (tmp_path / "y").exists()


def test_a_step_that_compiles_a_part_restarts_the_rate(tmp_path, monkeypatch):
    bar, prepare_job = mock.MagicMock(), training.prepare_job

    def with_a_second_part(*args):
        job = prepare_job(*args)
        again = job.parts[0]._replace(name="again", due=lambda step: step % 3 == 0)
        return job._replace(parts=(*job.parts, again))

    monkeypatch.setattr(training, "prepare_job", with_a_second_part)
    monkeypatch.setattr(loop, "progress", lambda *args, **options: bar)
    train(tiny.train_config(steps=4), tmp_path)
    assert [call.kwargs["restart"] for call in bar.__enter__().update.call_args_list] == [True, False, True, False]


def test_divergence_names_stage_step_and_term_and_keeps_the_checkpoint(tiny_teacher, tmp_path):
    tmp_path = shutil.copytree(tiny_teacher, tmp_path / "run")

    def broken(net, batch, key):
        x = batch["latents"]
        return net(x, jnp.ones((len(x), 1)), batch)[:, 0, 0, 0, 0] * jnp.nan, {}

    losses.register("broken", broken)
    config = tiny.train_config(steps=8)
    config.losses.mine = dict(loss="broken", weight=1.0, options={})
    with pytest.raises(Diverged, match=r"stage teacher, step 7: mine is not finite \(nan\); step 6 is kept in"):
        train(config, tmp_path, show_progress=False)
    with Checkpointer(tmp_path / "checkpoints", read_only=True) as checkpointer:
        assert checkpointer.latest_step() == 6
    assert all(np.isfinite(x).all() for x in _leaves(tmp_path, 6).values())


def _mean_square(net, batch, key, *, scale=1.0):
    x = batch["latents"]
    v = net(x, jax.numpy.ones((x.shape[0], 1)), batch)
    return scale * jax.numpy.mean(v**2, axis=(1, 2, 3, 4)), {"largest": jax.numpy.abs(v).max()}


def test_a_loss_of_ones_own_by_registration_and_by_file(tmp_path):
    losses.register("mean_square", _mean_square)
    (tmp_path / "mine.py").write_text(
        "import jax.numpy as jnp\n"
        "def gap(net, batch, key, *, scale=1.0):\n"
        "    x = batch['latents']\n"
        "    v = net(x, jnp.ones((x.shape[0], 1)), batch)\n"
        "    return scale * jnp.mean(jnp.abs(v), axis=(1, 2, 3, 4)), {}\n"
    )
    config = tiny.train_config(steps=2)
    config.losses.registered = dict(loss="mean_square", weight=0.5, options=dict(scale=2.0))
    config.losses.from_file = dict(loss=f"{tmp_path / 'mine.py'}:gap", weight=0.1, options={})
    train(config, tmp_path / "run", show_progress=False)
    line = read_scalars(tmp_path / "run")[-1]
    total = line["teacher/flow_matching"] + 0.5 * line["teacher/registered"] + 0.1 * line["teacher/from_file"]
    assert line["teacher/loss"] == pytest.approx(total, rel=1e-5) and "teacher/registered/largest" in line
    Run.load(tmp_path / "run")

    config.losses.registered.options.weigth = 1.0
    with pytest.raises(UserError, match=r"no option 'weigth'.*scale"):
        read_settings(config)


@pytest.mark.parametrize("name", ["nothing", "no.such.module:f", "missing.py:f", "greedy_distill_jax.losses:absent"])
def test_an_unknown_loss_names_itself(name):
    with pytest.raises(UserError, match=name.split(":")[0].split("/")[-1]):
        losses.resolve(name)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(stage="stage9"), "config.stage"),
        (dict(steps=0), "config.steps is 0"),
        (dict(log__fps=0), "config.log.fps is 0"),
        (dict(log__fps=60), "config.log.fps is 60; it must be from 1 to 50"),
        (dict(text_dropout=1.5), "text_dropout is 1.5"),
        (dict(data__size=20), "Latent grid 5x5"),
        (dict(data__batch=6), "config.data.batch is 6"),
        (dict(model__num_heads=0), "config.model.num_heads is 0; it must be from 1 to"),
        (dict(optimizer__clip=-1.0), "config.optimizer.clip is -1.0; it must be at least 0"),
        (
            dict(optimizer__betas=(0.9,)),
            "config.optimizer.betas is .0.9,.; it must be 2 values, each from 0 to",
        ),
        (dict(losses__flow_matching__options={"shift": 0}), "option shift is 0; it must be above 0"),
        (dict(losses__flow_matching__options={"weighting": "foo"}), "weighting is 'foo'"),
        (dict(losses__flow_matching__options={"draws": 2}), "options.draws"),
        (dict(model__size="huge"), "config.model.size"),
        (dict(model__num_heads=5), "num_heads 5"),
        (dict(data__source="films"), "films"),
        (dict(mesh__data=3), r"mesh \(data=3"),
        (dict(stage="teacher_forcing", student__chunk=3), "does not divide into chunks"),
        (dict(stage="teacher_forcing", student__split="thirds"), "split 'thirds'"),
        (dict(stage="teacher_forcing", sample__sampler="ddim"), "ddim"),
        (dict(sample__sampler="renoise"), "a teacher.s are euler, unipc, unipc_wan"),
        (dict(stage="teacher_forcing", teacher_from="/nowhere"), "/nowhere holds no run"),
    ],
)
def test_bad_config_values_name_themselves(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        train(tiny.train_config(**changes), tmp_path / "run", show_progress=False)
    assert not (tmp_path / "run").exists(), "something was written before the config was refused"


def test_unknown_keys_are_errors_wherever_they_are_set(tmp_path):
    config = tiny.train_config()
    with config.unlocked():
        config.optimizer.lerning_rate = 1.0
    with pytest.raises(
        UserError, match=r"config\.optimizer\.lerning_rate.*did you mean config\.optimizer\.learning_rate"
    ):
        train(config, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--config=configs/base.py"], "--workdir is missing"),
        (["--config=configs/base.py", "--workdir={}", "--config.data.bach=3"], "data.bach"),
        (["--config=configs/nothing.py", "--workdir={}"], "nothing.py"),
        (["--config=configs/quickstart.py:pupil", "--workdir={}"], "pupil"),
        (["--config=configs/base.py", "--workdir=/proc/run", "--config.compile_cache="], "/proc/run"),
    ],
)
def test_commands_answer_bad_input_with_one_line_and_code_2(tmp_path, capsys, arguments, message):
    assert exit_code(training.main, *(a.format(tmp_path / "run") for a in arguments)) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert len([line for line in error.splitlines() if line.startswith("error:")]) == 1
    assert not (tmp_path / "run").exists()


def test_the_stored_config_is_the_config(tiny_teacher):
    config = tiny.train_config()
    assert json.loads(Run.load(tiny_teacher).settings.text) == json.loads(json.dumps(config.to_dict()))


def test_training_options_of_the_student_run_together(tmp_path):
    """Context noise, keys of the last step, two noise draws, chunks of two frames and faster new parameters."""
    config = tiny.train_config(
        "teacher_forcing",
        steps=2,
        student__chunk=2,
        student__context="last_step_kv",
        student__context_noise=0.3,
        optimizer__new_scale=10.0,
    )
    config.losses.flow_matching.options.draws = 2
    assert read_settings(config).terms[0].options["group"] == 2
    train(config, tmp_path, show_progress=False)
    assert Run.load(tmp_path).sample_videos(["a red square moving left"], frames=6).shape == (1, 6, 16, 16, 3)


@pytest.mark.parametrize("found, held", [("abc", {"data.source": "abc"}), (None, {}), ("", {})])
def test_a_fingerprint_is_a_text(found, held):
    assert job._content(source=mock.Mock(fingerprint=found), text=object()) == held
    for wrong in (lambda: "abc", 7, b"abc"):
        with pytest.raises(UserError, match="the fingerprint of .* is a (function|int|bytes); make it a text") as error:
            job._content(text=mock.Mock(fingerprint=wrong))
        assert error.value.field == "text"


def test_a_job_is_traced_once(tmp_path):
    """For the audit, which searches the program that is compiled; not again for the first update."""
    traced = []

    def counted(net, batch, key):
        traced.append(1)
        return _mean_square(net, batch, key)

    losses.register("counted", counted)
    config = tiny.train_config(steps=2)
    del config.losses["flow_matching"]
    config.losses.counted = dict(loss="counted", weight=1.0, options={})
    train(config, tmp_path, show_progress=False)
    assert len(traced) == 1
