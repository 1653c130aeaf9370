"""Command lines: overrides, one line for mistakes, exit codes."""

import contextlib
import os
import pathlib
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest
from ml_collections import ConfigDict

from greedy_distill_jax import cli, prepare, sample
from greedy_distill_jax.cli import sample_options, signals
from greedy_distill_jax.cli.config_flags import key_paths, load_config, read_config
from greedy_distill_jax.config import read_settings
from greedy_distill_jax.diffusion import solvers
from greedy_distill_jax.errors import UserError
from greedy_distill_jax.storage.partial import Partial
from greedy_distill_jax.training.stop import Stop

CONFIG = """
from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def get_config(size="small"):
    if size not in ("small", "large"):
        raise ValueError(f"size {size!r} is unknown; choose small or large")
    c = ConfigDict()
    c.steps = 10
    c.rate = 1.0
    c.flag = True
    c.name = size
    c.width = placeholder(int)
    c.optimizer = ConfigDict({"clip": 1.0, "betas": (0.9, 0.99)})
    c.losses = ConfigDict({"mse": ConfigDict({"weight": 1.0, "options": ConfigDict()})})
    return c.lock()
"""
FLAGS = {
    "workdir": (str, None, "directory of the run"),
    "count": (int, 3, "how many"),
    "prompt": (list, [], "may be repeated"),
    "fast": (bool, False, "less of everything"),
}


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "a_config.py"
    path.write_text(CONFIG)
    return str(path)


def test_overrides_have_the_type_of_the_default(file):
    config, flags = load_config(
        [
            f"--config={file}:large",
            "--config.steps=5",
            "--config.rate=2",
            "--noconfig.flag",
            "--config.width=64",
            "--config.optimizer.betas=(0.5, 0.6)",
            "--config.losses.mine.weight=0.5",
            "--config.losses.mine.loss=my_losses.py:mine",
            "--config.losses.mse.options.power=2",
            "--workdir",
            "runs/a",
            "--prompt=one",
            "--prompt=two, three",
            "--fast",
        ],
        FLAGS,
        open_keys=("losses",),
    )
    assert (config.steps, config.rate, config.flag, config.width, config.name) == (5, 2.0, False, 64, "large")
    assert isinstance(config.rate, float) and config.optimizer.betas == (0.5, 0.6)
    assert config.losses.mine.to_dict() == {"weight": 0.5, "loss": "my_losses.py:mine"}
    assert config.losses.mse.options.power == 2
    assert flags == {"workdir": "runs/a", "count": 3, "prompt": ["one", "two, three"], "fast": True}
    with pytest.raises(AttributeError):
        config.unknown = 1


def test_two_command_lines_in_one_process_do_not_meet(file):
    first, _ = load_config(["--config", file, "--config.steps=5"], FLAGS)
    second, _ = load_config([], FLAGS, default=file)
    assert (first.steps, second.steps) == (5, 10)


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("--config.stps=5", "--config.stps is not a configuration key; did you mean --config.steps?"),
        ("--config.optim.clip=5", "did you mean --config.optimizer.clip?"),
        ("--config.clip=5", "did you mean --config.optimizer.clip?"),
        ("--config.steps.more=5", "--config.steps.more is not a configuration key"),
        ("--config.zzz=5", "the keys are"),
        ("--config.steps=1.5", "--config.steps=1.5 is not of type int; it is 10"),
        ("--config.steps=many", "--config.steps=many is not of type int; it is 10"),
        ("--config.width=x", "--config.width=x is not of type int"),
        ("--config.flag=perhaps", "--config.flag=perhaps is not of type bool"),
        ("--config.optimizer=adam", "is a group of keys; set one of them: optimizer.betas, optimizer.clip"),
        ("--config.losses.mse.weight.x=1", "is a value and has no keys"),
        ("--config.steps", "--config.steps"),
        ("--wrkdir=x", "--wrkdir is not an option; did you mean --workdir?"),
        ("--count=x", "count"),
        ("stray", "'stray' is not understood"),
        ("--config", "--config needs a value"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_remedy(file, argument, expected):
    with pytest.raises(UserError) as error:
        load_config([f"--config={file}", argument], FLAGS, open_keys=("losses",))
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "suffix", "expected"),
    [
        (None, "", "no such file"),
        ("def get_config(:", "", "c.py, line 1: it is not Python (invalid syntax)"),
        ("\0\0", "", "c.py: it is not Python (source code string cannot contain null bytes)"),
        ("import os\nimport no_such_module", "", "c.py, line 2: No module named 'no_such_module'"),
        ("\nfrom os import nothing", "", "c.py, line 2: cannot import name 'nothing'"),
        ("def get_config():\n    return ConfigDict()", "", "c.py, line 2: name 'ConfigDict' is not defined"),
        (f"{CONFIG}\nget_config().stps = 3", "", 'Key "stps" does not exist'),
        ("\ndef get_config(): return 1", "", "c.py, line 2: get_config() returned int, not a ConfigDict"),
        ("x = 1", "", "defines no get_config"),
        ("def get_config(): return 1", "", "not a ConfigDict"),
        ("get_config = 3", ":x", "get_config is a int, not a function"),
        (CONFIG, ":medium", "choose small or large"),
        ("def get_config(): return None", ":x", "get_config() takes 0 positional arguments"),
    ],
)
def test_a_bad_configuration_file(tmp_path, content, suffix, expected):
    path = tmp_path / "c.py"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match="c.py") as error:
        read_config(f"{path}{suffix}")
    assert expected in str(error.value)


def test_an_argument_that_the_configuration_below_refuses_is_one_line():
    with pytest.raises(UserError, match="--config=configs/wan14b/dmd.py:paper: 'paper' is not one of critic"):
        read_config("configs/wan14b/dmd.py:paper")


def test_another_kind_of_file_is_no_configuration(tmp_path):
    (tmp_path / "c.yaml").write_text("steps: 3")
    with pytest.raises(UserError, match="c.yaml: configurations are Python files"):
        read_config(f"{tmp_path}/c.yaml")


def test_a_folder_is_no_configuration_file(tmp_path):
    with pytest.raises(UserError, match=f"--student={tmp_path}: is a folder, not a configuration file"):
        read_config(str(tmp_path), "--student")


def test_a_bug_in_a_configuration_file_keeps_its_traceback(tmp_path):
    path = tmp_path / "c.py"
    path.write_text("def inner():\n    return {}['missing']\n\ndef get_config():\n    return inner()\n")
    with pytest.raises(KeyError):
        read_config(str(path))


def test_a_configuration_is_found_from_anywhere_in_the_checkout(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert isinstance(read_config("configs/base.py"), ConfigDict)


def test_a_configuration_imports_its_siblings(tmp_path):
    folder = tmp_path / "configs"
    folder.mkdir()
    (folder / "sibling_of_a_test.py").write_text("steps = 7\n")
    (folder / "c.py").write_text(
        "from ml_collections import ConfigDict\nfrom configs import sibling_of_a_test as s\n"
        "def get_config():\n    return ConfigDict({'steps': s.steps})\n"
    )
    before = list(sys.path)
    assert read_config(str(folder / "c.py")).steps == 7
    assert sys.path == before


def test_key_paths():
    config = ConfigDict({"a": 1, "b": {"c": 2}})
    assert sorted(key_paths(config)) == ["a", "b", "b.c"]


def test_help_lists_the_options(capsys):
    with pytest.raises(SystemExit) as exit_:
        load_config(["--help"], FLAGS, default="configs/base.py")
    out = capsys.readouterr().out
    assert exit_.value.code == 0
    assert all(f"--{name}" in out for name in FLAGS) and "configs/base.py" in out


def _raise(error):
    def main():
        raise error

    return main


@pytest.mark.parametrize(
    ("main", "code", "err"),
    [
        (lambda: None, 0, ""),
        (lambda: 4, 4, ""),
        (_raise(UserError("a bad\nvalue")), 2, "error: a bad value\n"),
        (_raise(KeyboardInterrupt()), 130, "interrupted\n"),
        (_raise(OSError(28, "Full", "x.mp4")), 2, "error: x.mp4 cannot be written (Full); free space.\n"),
    ],
)
def test_exit_codes(main, code, err, capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.run(main)
    assert exit_.value.code == code
    assert capsys.readouterr().err == err


@pytest.mark.parametrize("lost", [False, True])
@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_end_a_command_that_does_not_unwind(tmp_path, monkeypatch, number, code, lost):
    """As in one long computation, or where what was raised in a callback is lost."""
    left, killed = [], threading.Event()
    monkeypatch.setattr(signals, "GRACE", 0.01 if lost else 60.0)
    monkeypatch.setattr(signals.os, "_exit", lambda code: (left.append(code), killed.set()))

    def main():
        partial = Partial(tmp_path / "out.mp4")
        try:
            signal.raise_signal(number)
        except BaseException:
            if not lost:
                partial.abort()
                raise
            assert killed.wait(30)

    before = [signal.getsignal(number) for number in signals.CODES]
    with pytest.raises(SystemExit) as exit_:
        cli.run(main)
    assert not list(tmp_path.iterdir()) and left == ([code] if lost else [])
    assert lost or exit_.value.code == code
    assert [signal.getsignal(number) for number in signals.CODES] == before


def test_training_keeps_its_signals(monkeypatch):
    """Its own handlers save first: nobody ends the process meanwhile."""
    left, asked, handler = [], threading.Semaphore(0), signal.getsignal
    monkeypatch.setattr(signals, "GRACE", 0.0)
    monkeypatch.setattr(signals.os, "_exit", left.append)
    with signals.ending(), Stop() as stop:
        monkeypatch.setattr(signals.signal, "getsignal", lambda number: (handler(number), asked.release())[0])
        for _ in range(2):  # once the second is looked at, nothing came of the first
            signal.raise_signal(signal.SIGTERM)
            assert asked.acquire(timeout=30)
    assert stop.signal == signal.SIGTERM and not left


def test_the_process_ends_whatever_its_last_acts_do(monkeypatch):
    left, ended, never = [], threading.Event(), threading.Event()
    monkeypatch.setattr(signals, "GRACE", 0.0)
    monkeypatch.setattr(signals, "_LAST", 0.0)
    monkeypatch.setattr(signals.os, "_exit", lambda code: (left.append(code), ended.set()))
    for act in ("abort_all", "_say_last"):
        ended.clear()
        with monkeypatch.context() as patch, contextlib.suppress(SystemExit), signals.ending():
            patch.setattr(signals, act, _raise(ValueError("x")) if act == "abort_all" else lambda _: never.wait(30))
            patch.setattr(threading, "excepthook", lambda _: None)
            with contextlib.suppress(SystemExit):
                signal.raise_signal(signal.SIGTERM)
            assert ended.wait(30)
    never.set()
    assert left == [143, 143]


@pytest.mark.filterwarnings("ignore:.*fork:")
def test_forked_children_have_their_own_signals_and_may_outlive_a_command(monkeypatch):
    """A child has the socket of its parent's watcher."""
    left, (end, start) = [], os.pipe()
    monkeypatch.setattr(signals, "GRACE", 0.0)
    monkeypatch.setattr(signals.os, "_exit", left.append)
    with signals.ending():
        child = os.fork()
        if not child:
            try:
                signal.raise_signal(signal.SIGTERM)
            except SystemExit:
                os.write(start, b"x")
                signal.pause()
            finally:  # it is no second run of the tests
                os.kill(os.getpid(), signal.SIGKILL)
        os.close(start)
        told = os.read(end, 1)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(end)
    assert told == b"x" and not left, "the watcher of the parent has seen the child's signal"


@pytest.mark.subprocesses
def test_a_platform_that_is_not_there_is_one_line(subprocess_env):
    code = "import jax\nfrom greedy_distill_jax import cli\ncli.run(lambda: jax.devices() and None)"
    env = {**subprocess_env, "JAX_PLATFORMS": "nowhere"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: JAX_PLATFORMS=nowhere: jax cannot start there (")
    assert len(done.stderr.splitlines()) == 1 and "set JAX_PLATFORMS=cpu" in done.stderr


@pytest.mark.parametrize("argument", ["--config.data.source=clips:~nobody-here/x", "~nobody-here"])
def test_a_home_that_there_is_not_is_one_line(argument, capsys):
    with pytest.raises(SystemExit) as end:
        cli.run(lambda argv: pathlib.Path("~nobody-here/x").expanduser(), [argument])
    assert end.value.code == 2 and capsys.readouterr().err.startswith(f"error: {argument}: there is no such user")


@pytest.mark.parametrize("form", ["--workdir={}/out", "--workdir={}/out/more:x", "--workdir {}/out", "{}"])
def test_a_name_that_is_too_long_is_one_line(form, capsys):
    name = "x" * 300
    with pytest.raises(SystemExit) as end:
        cli.run(lambda argv: os.stat(f"{name}/out"), form.format(name).split())
    told = capsys.readouterr().err
    assert end.value.code == 2 and told.count("\n") == 1 and "choose a shorter name" in told
    assert told.startswith(f"error: {'--workdir: ' if 'workdir' in form else ''}{name}")


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--switch", "1:a", "--switch", "01:b"], "--switch: frame 1 has two new prompts, 'a' and 'b'"),
        (["--prompt", "\udcff"], "--prompt: it is '\\udcff', which is not UTF-8"),
        (["--fps=--"], "--fps: it is --, which is no value"),
        (["--output", "out.avi"], "--output: cannot write out.avi"),
    ],
)
def test_refusals_of_sample(arguments, said, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        cli.run(sample.main, ["--checkpoint", str(tmp_path), "--prompt", "a", "--frames", "3", *arguments])
    assert end.value.code == 2 and capsys.readouterr().err.startswith(f"error: {said}")
    assert not list(tmp_path.iterdir())


def test_other_errors_keep_their_traceback():
    with pytest.raises(ZeroDivisionError):
        cli.run(lambda: 1 / 0)


def test_arguments_are_handed_on():
    seen = []
    with pytest.raises(SystemExit):
        cli.run(seen.append, ["--a"])
    with pytest.raises(SystemExit):
        cli.run(lambda argv=None: seen.append(argv))
    assert seen == [["--a"], None]


@pytest.mark.subprocesses
def test_a_process_ends_with_one_line(subprocess_env):
    code = (
        "from greedy_distill_jax import cli\nfrom greedy_distill_jax.errors import UserError\n"
        "def main():\n    raise UserError('too few frames')\ncli.run(main)"
    )
    done = subprocess.run([sys.executable, "-c", code], env=subprocess_env, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "error: too few frames\n")


@pytest.mark.subprocesses
@pytest.mark.parametrize("raised, code", [("KeyboardInterrupt", 130), ("SystemExit(143)", 143)])
def test_a_crash_on_the_way_down_does_not_change_the_code(raised, code, subprocess_env):
    """A process that Ctrl-C met in a compilation crashes when the interpreter is taken down."""
    source = (
        "import atexit, ctypes\nfrom greedy_distill_jax import cli\n"
        "class Crash:\n    def __del__(self, string_at=ctypes.string_at):\n        string_at(0)\n"
        "crash = Crash()\natexit.register(print, 'left')\n"
        f"def main():\n    raise {raised}\ncli.run(main)"
    )
    done = subprocess.run([sys.executable, "-c", source], env=subprocess_env, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (code, "left\n")


@pytest.mark.parametrize("file", ["wan1_3b/dmd.py", "quickstart.py"])
def test_the_published_stage_2_has_no_critic(file):
    config = read_config(f"configs/{file}:greedy_distill_paper").lock()
    config.student_from = config.teacher_from = "a run"
    read_settings(config, imagine_runs=True)
    d = config.distill
    assert (d.real, d.fake, d.pg, d.generator_every) == ("joint", "self_sg", "rollout_trunc", 1)


def test_the_diagonal_presets():
    """Both at full size, plan and loss weights as the paper and its codes have them."""
    found = {}
    for name in ("diagonal", "diagonal_paper"):
        config = read_config(f"configs/wan1_3b/dmd.py:{name}").lock()
        config.student_from = config.teacher_from = "a run"
        settings = found[name] = read_settings(config, imagine_runs=True)
        assert settings.plan.lengths.tolist() == [4, 3, 2] and settings.student_config.context == "last_step_kv"
        np.testing.assert_allclose(settings.plan.sigmas[0], (1.0, 14 / 15, 5 / 6, 5 / 14), rtol=1e-6)
    cfg, terms = found["diagonal_paper"].student_config, found["diagonal_paper"].losses
    assert (cfg.chunk, cfg.window, cfg.sink, cfg.base.num_layers) == (3, 12, 3, 30)
    assert {name: (term.loss, term.weight) for name, term in terms.items()} == {
        "dmd": ("dmd", 4.0),
        "motion": ("motion_head", 4.0),
        "regression": ("ode", 1.0),
    }


@pytest.mark.parametrize("size", ["wan1_3b", "wan14b"])
def test_the_presets_of_stage_3(size):
    """At full size, with the rates and weights of their papers."""
    found = {}
    for name in ("nft", "cm_grpo", "self_teacher"):
        config = read_config(f"configs/{size}/rl.py:{name}").lock()
        config.student_from = "a run"
        settings = read_settings(config, imagine_runs=True)
        assert settings.optimizer.lora.rank == 256 and settings.own["rl"].frames == 4 * settings.data.frames
        terms = {name: term.weight for name, term in settings.losses.items()}
        found[name] = terms, settings.optimizer.learning_rate, settings.optimizer.betas, len(settings.own["rl"].rewards)
    assert found == {
        "nft": ({"nft": 1.0, "kl": 1e-4}, 1e-5, (0.9, 0.999), 3),
        "cm_grpo": ({"cm_grpo": 100.0}, 5e-6, (0.0, 0.999), 3),
        "self_teacher": ({"self_teacher": 1.0}, 1e-5, (0.0, 0.999), 0),
    }


@pytest.mark.parametrize("command", ["clips", "text", "latents", "ode"])
def test_help_of_prepare(command, capsys):
    with pytest.raises(SystemExit) as end:
        prepare.main([command, "--help"])
    told = capsys.readouterr().out
    assert end.value.code == 0 and "--output DIR" in told and len(told) > 500


@pytest.mark.subprocesses
@pytest.mark.parametrize("argument, code", [("--help", 0), ("--frames=x", 2), ("--checkpoint=none", 2)])
def test_sample_answers_before_it_imports(argument, code, subprocess_env):
    source = (
        "import sys\nfrom greedy_distill_jax import cli, sample\n"
        "try:\n    cli.run(sample.main, sys.argv[1:])\n"
        "finally:\n    print([m for m in ('jax', 'numpy', 'tqdm', 'av') if m in sys.modules])"
    )
    command = [sys.executable, "-c", source, "--prompt", "a", argument]
    done = subprocess.run(command, env=subprocess_env, capture_output=True, text=True)
    assert done.returncode == code and done.stdout.splitlines()[-1] == "[]", done.stdout + done.stderr


def test_solvers_of_sample_are_all():
    (action,) = (action for action in sample_options.parser("")._actions if action.dest == "solver")
    assert action.choices == solvers.SOLVERS


def test_help_of_sample(capsys):
    with pytest.raises(SystemExit) as end:
        sample.main(["--help"])
    told = capsys.readouterr().out
    assert end.value.code == 0 and all(
        f"--{name}" in told for name in ("checkpoint", "model", "solver", "negative-prompt")
    )
