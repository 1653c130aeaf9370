"""The quickstart in its smoke size, once, and everything that reads its result: report, notebook, sample, evaluate."""

import dataclasses
import functools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import av
import jax
import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from PIL import Image

from greedy_distill_jax import convert, evaluate as evaluation, quickstart, sample
from greedy_distill_jax.data.video_io import VideoWriter, probe, read_frames
from greedy_distill_jax.errors import UserError
from greedy_distill_jax.eval.evaluation import evaluate
from greedy_distill_jax.eval.tables import validate_metrics
from greedy_distill_jax.runs.run import Run
from greedy_distill_jax.runs.teacher_sampler import TeacherSampler
from greedy_distill_jax.storage.checkpoint import load_meta
from greedy_distill_jax.testing import tiny
from tests.conftest import exit_code

ROOT = Path(__file__).resolve().parent.parent
PROMPTS = ("a red square moving left", "a blue circle moving up")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The workdir of a finished smoke run; programs are cached where the suite caches its own."""
    workdir = tmp_path_factory.mktemp("quickstart") / "run"
    configs_of = quickstart.stage_configs

    def stage_configs(*args, **kwargs):
        configs = configs_of(*args, **kwargs)
        for config in configs.values():
            config.compile_cache = ""
            config.data.batch = 8  # one example for each of the suite's devices
        return configs

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quickstart, "stage_configs", stage_configs)
        patch.setattr(quickstart, "evaluate", functools.partial(evaluate, lengths=(32, 256)))  # 1024 frames take long
        report = quickstart.quickstart(workdir, controls=True, speed="smoke")
    assert report == workdir / "report" / "report.html"
    return workdir


@pytest.fixture(scope="module")
def student(finished):
    return Run.load(finished / "student")


# --- what it leaves ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_it_leaves_a_report_with_every_number(finished):
    assert "<html" in (finished / "report/report.html").read_text(encoding="utf-8")
    metrics = json.loads((finished / "report/metrics.json").read_text(encoding="utf-8"))
    validate_metrics(metrics)
    names = ["data", "teacher", "stage1", "stage1_few_steps", "stage2", "stage3", "stage2_fake_self", "stage1_control"]
    assert [row["name"] for row in metrics["rows"]] == names
    assert set(metrics["rows"][0]) > {
        "name",
        "steps",
        "direction",
        "valid_last",
        "fd_last",
        "train_cpu_s",
        "train_seed",
    }
    data, teacher, many, few, stage2, stage3, own, control = metrics["rows"]
    assert few["steps"] == stage2["steps"] == stage3["steps"] == control["steps"] == own["steps"] == "4,2"
    assert all(row["train_cpu_s"] > 0 for row in (stage2, stage3, own))
    # The control spends what stage 2 spent, to the nearest update.
    steps = load_meta(finished / "stage1_control" / "checkpoints")["steps"]
    of_update = many["train_cpu_s"] / load_meta(finished / "student" / "checkpoints")["steps"]
    assert abs(steps * of_update - stage2["train_cpu_s"]) <= of_update
    assert data["direction"] == data["valid_first"] == 1.0 and data["valid_last"] == pytest.approx(1.0, abs=0.01)
    assert teacher["train_cpu_s"] > 0 and many["train_cpu_s"] > 0 and few["train_seed"] == many["train_seed"] == 0
    assert teacher["valid_last"] == "\N{EN DASH}" and data["train_seed"] == "\N{EN DASH}"
    times = {row["frames"]: row for row in metrics["tables"]["time_per_frame"]}
    assert {32, 256} <= set(times)
    assert all(row.keys() == {"frames", "etm_sdd", "full_causal", "teacher"} for row in times.values())
    assert all(value > 0 for row in times.values() for value in row.values())
    streaming, growing = (row["bytes"] for row in metrics["tables"]["cache_bytes"])
    assert 0 < streaming < growing
    assert metrics["versions"]["jax"] and metrics["device"] and metrics["cpu"] and "commit" in metrics
    assert metrics["training_frames"] == 8 and len(metrics["gates"]) == 11
    assert metrics["config"]["student"]["teacher_from"] == str(finished / "teacher")


def test_it_leaves_a_video_that_decodes(finished):
    frames = list(read_frames(finished / "stream.mp4"))
    assert len(frames) == 128 and frames[0].shape == (128, 128, 3)
    assert probe(finished / "stream.mp4").fps == pytest.approx(8)


def test_a_second_call_says_that_it_is_done(finished, capsys):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()}
    assert quickstart.quickstart(finished, speed="smoke") == finished / "report" / "report.html"
    said = capsys.readouterr().out
    assert "already done" in said and str(finished) in said
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("options", [dict(speed="fast"), dict(speed="smoke", clips=Path("c"), captions=Path("d"))])
def test_another_job_in_the_same_folder_is_refused(finished, options):
    with pytest.raises(UserError, match="holds another job.*moving_shapes, smoke"):
        quickstart.quickstart(finished, **options)
    assert (finished / "job").read_text() == "moving_shapes, smoke"


# --- the notebook -----------------------------------------------------------------------------------------------------


def _execute(path, env, changes=None):
    """Outputs of a notebook's cells; ``changes``: what stands in it, and what is run instead."""
    notebook = nbformat.read(path, as_version=4)
    for old, new in (changes or {}).items():
        (cell,) = (cell for cell in notebook.cells if old in cell.source)
        cell.source = cell.source.replace(old, new)
    client = NotebookClient(
        notebook, timeout=None, kernel_name="python3", resources={"metadata": {"path": path.parent}}
    )
    client.execute(env=env)
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


# Programs are kept where the suite keeps its own.
OWN_CACHE = {"    return config\n": '    config.compile_cache = ""\n    return config\n'}


@pytest.fixture
def kernel_env(subprocess_env, tmp_path):
    env = {**subprocess_env, "JAX_PLATFORMS": "cpu", "IPYTHONDIR": str(tmp_path), "JUPYTER_RUNTIME_DIR": str(tmp_path)}
    env.pop("MPLBACKEND", None)  # the kernel's own draws into the notebook
    return env


@pytest.mark.subprocesses
def test_the_stream_notebook_runs(finished, kernel_env):
    path = ROOT / "notebooks" / "01_stream.ipynb"
    outputs = _execute(path, kernel_env | {"QUICKSTART": str(finished)})
    shown = [kind for output in outputs for kind in output.get("data", {})]
    assert shown.count("image/gif") == 1 and shown.count("image/png") >= 3
    assert not [output for output in outputs if output.get("name") == "stderr"], "it warns"


@pytest.mark.subprocesses
def test_the_loss_notebook_runs(finished, kernel_env):
    env = kernel_env | {"QUICKSTART": str(finished), "MINUTES": "0.05"}
    changes = {"FRAMES, VIDEOS = 32, 64": "FRAMES, VIDEOS = 32, 8", **OWN_CACHE}
    outputs = _execute(ROOT / "notebooks" / "02_swap_a_loss.ipynb", env, changes)
    shown = [kind for output in outputs for kind in output.get("data", {})]
    assert shown.count("image/gif") == 1 and shown.count("image/png") == 1
    assert any("dmd + steady" in output.get("text", "") for output in outputs)


@pytest.mark.subprocesses
def test_the_export_notebook_runs(finished, kernel_env):
    pytest.importorskip("torch", reason="needs PyTorch: pip install 'greedy_distill_jax[torch]'")
    outputs = _execute(ROOT / "notebooks" / "03_export_to_torch.ipynb", kernel_env | {"QUICKSTART": str(finished)})
    shown = [kind for output in outputs for kind in output.get("data", {})]
    assert shown.count("image/gif") == 1 and shown.count("image/png") == 1
    said = "".join(output.get("text", "") for output in outputs)
    (difference,) = re.findall(r"differ by (\S+) at most", said)
    assert float(difference) < 1e-3
    (graphs,) = re.findall(r"graphs after each of 30 chunks: \[(.*)\]", said)
    assert graphs.split(", ")[-20:] == ["4"] * 20


@pytest.mark.subprocesses
def test_the_reward_notebook_runs(finished, kernel_env):
    env = kernel_env | {"QUICKSTART": str(finished), "MINUTES": "0.05"}
    changes = {"FRAMES, VIDEOS = 64, 64": "FRAMES, VIDEOS = 64, 8", **OWN_CACHE}
    outputs = _execute(ROOT / "notebooks" / "04_rewards.ipynb", env, changes)
    shown = [kind for output in outputs for kind in output.get("data", {})]
    assert shown.count("image/gif") == 1 and shown.count("image/png") == 1
    assert any("+ pace_kept" in output.get("text", "") for output in outputs)


@pytest.mark.subprocesses
def test_the_stream_notebook_says_what_is_missing(tmp_path, kernel_env):
    with pytest.raises(CellExecutionError, match="bash launch/quickstart.sh"):
        _execute(ROOT / "notebooks" / "01_stream.ipynb", kernel_env | {"QUICKSTART": str(tmp_path)})


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
def test_notebooks_are_stored_without_outputs(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert code and not any(cell.outputs or cell.execution_count for cell in code)


# --- the documents ----------------------------------------------------------------------------------------------------


def test_the_pytorch_student_of_the_documents_runs(finished, tmp_path, monkeypatch):
    torch = pytest.importorskip("torch", reason="needs PyTorch: pip install 'greedy_distill_jax[torch]'")
    page = (ROOT / "docs" / "weights.md").read_text(encoding="utf-8")
    (block,) = (b for b in re.findall(r"```python\n(.*?)```", page, re.S) if "torch_student" in b)
    assert exit_code(convert.main, "export", finished / "stage2", tmp_path / "DIR", "--format", "torch-student") == 0
    monkeypatch.chdir(tmp_path / "DIR")
    monkeypatch.syspath_prepend(str(tmp_path / "DIR"))
    monkeypatch.delitem(sys.modules, "torch_student", raising=False)
    names = {}
    try:
        exec(compile(block, "weights.md", "exec"), names)
    finally:
        sys.modules.pop("torch_student", None)
    assert names["text"].shape == (1, 16, 32) and names["latents"].shape == (1, 32, 16, 4, 4)
    assert torch.isfinite(names["latents"]).all()
    assert names["video"].shape == (1, 32, 16, 16, 3) and names["video"].dtype == np.uint8
    # The rows and the codec are those of the run.
    run = Run.load(finished / "stage2")
    np.testing.assert_array_equal(names["text"], run.text(["a red square moving left"]))
    np.testing.assert_array_equal(names["video"], run.codec.decode(names["latents"].permute(0, 1, 3, 4, 2).numpy()))


# --- sample -----------------------------------------------------------------------------------------------------------


def _sample(run, *arguments, prompts=PROMPTS[:1]):
    given = [word for prompt in prompts for word in ("--prompt", prompt)]
    sample.main(["--checkpoint", str(run), *given, *map(str, arguments)])


def test_several_prompts_make_several_files(finished, tmp_path, capsys):
    _sample(finished / "student", "--frames", 10, "--output", tmp_path / "new/out.mp4", prompts=PROMPTS)
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["out-0.mp4", "out-1.mp4"]
    for number, prompt in enumerate(PROMPTS):
        path = tmp_path / "new" / f"out-{number}.mp4"
        info = probe(path)
        assert (info.width, info.height, info.frames) == (128, 128, 10) and info.fps == pytest.approx(8)
        assert len(list(read_frames(path))) == 10
        assert f"{path}: 10 frames, {prompt!r}" in capsys.readouterr().out or number


def test_size_rate_and_steps_are_as_asked(finished, tmp_path):
    out = tmp_path / "out.mp4"
    _sample(finished / "student", "--frames", 7, "--fps", 12.5, "--upscale", 3, "--steps", 1, "--output", out)
    info = probe(out)
    assert (info.width, info.height, info.frames) == (48, 48, 7) and info.fps == pytest.approx(12.5)


@pytest.mark.parametrize("name, decoder", [("out.webm", "webm"), ("out.gif", "gif")])
def test_other_containers(finished, tmp_path, name, decoder):
    _sample(finished / "student", "--frames", 6, "--output", tmp_path / name)
    with av.open(os.fspath(tmp_path / name)) as container:
        assert decoder in container.format.name
    assert len(list(read_frames(tmp_path / name))) == 6
    if name.endswith("gif"):
        assert Image.open(tmp_path / name).n_frames == 6


def test_a_switch_changes_what_follows_and_nothing_before(finished, student, tmp_path):
    # Four updates leave the text without a visible effect, so the weights are random here.
    run = dataclasses.replace(student, params=tiny.random_params(student.model, latent_shape=student.latent_shape))
    plain, switched = (
        np.concatenate(list(run.session([PROMPTS[0]]).play(6, switches)), axis=1)
        for switches in (None, {3: PROMPTS[1]})
    )
    np.testing.assert_array_equal(plain[:, :3], switched[:, :3])
    assert all((plain[:, t] != switched[:, t]).any() for t in range(3, 6))
    out = tmp_path / "out.mp4"
    _sample(finished / "student", "--frames", 6, "--switch", f"3:{PROMPTS[1]}", "--switch", "5:", "--output", out)
    assert len(list(read_frames(out))) == 6


def test_a_teacher_makes_whole_videos(finished, tmp_path):
    _sample(finished / "teacher", "--frames", 8, "--output", tmp_path / "out.mp4", prompts=PROMPTS)
    assert [len(list(read_frames(tmp_path / f"out-{i}.mp4"))) for i in (0, 1)] == [8, 8]
    options = ["--solver", "unipc", "--shift", "3", "--guidance", "4", "--negative-prompt", PROMPTS[1]]
    _sample(finished / "teacher", "--frames", 8, "--steps", 4, "--output", tmp_path / "other.mp4", *options)
    assert len(list(read_frames(tmp_path / "other.mp4"))) == 8


def test_what_is_asked_of_a_teacher_replaces_its_config(finished):
    run = Run.load(finished / "teacher")
    asked = run.teacher_sampler(solver="unipc", shift=3.0, guidance=4.0, negative_prompt=PROMPTS[1])
    assert (asked.solver, asked.shift, asked.guidance) == ("unipc", 3.0, 4.0)
    np.testing.assert_array_equal(asked.null, run.text([PROMPTS[1]]))
    own = run.teacher_sampler()
    assert (own.solver, own.steps) == (run.settings.sample.sampler, run.settings.sample.steps) == ("euler", 2)
    assert (own.null != asked.null).any()


@pytest.mark.parametrize(
    "run, arguments, message",
    [
        ("student", ["--frames", "0"], "--frames: it is 0; it must be at least 1"),
        ("student", ["--steps", "0"], "--steps: it is 0; it must be from 1 to 1000"),
        ("student", ["--steps", "4,x"], "--steps: the steps of a chunk are 'x'"),
        ("student", ["--switch", "halfway"], "--switch: 'halfway' is not of the form FRAME:"),
        ("student", ["--switch", "x:a red square moving up"], "is not of the form FRAME:"),
        ("student", ["--switch", "-2:a red square moving up"], "is not of the form FRAME:"),
        ("student", ["--switch", "²:a red square moving up"], "is not of the form FRAME:"),
        ("student", ["--switch", "0:a red square moving up"], "--switch: frame 0 lies outside.* 1 to 5, or change the"),
        ("student", ["--frames", "1", "--switch", "1:a"], "--switch: a video of 1 frame has nothing to switch"),
        ("student", ["--fps", "-1"], "--fps: it is -1; it must be from 0.1 to 240"),
        ("student", ["--fps", "0"], "--fps: it is 0; it must be from 0.1 to 240"),
        ("student", ["--upscale", "-2"], "--upscale: it is -2; it must be at least 0"),
        ("teacher", ["--switch", "3:a red square moving up"], "needs a streaming student"),
        ("teacher", ["--steps", "4,2"], "--steps: 4,2 is not one number"),
        ("teacher", ["--height", "16"], "--height belongs to --model"),
        ("student", ["--solver", "unipc"], "--solver needs a teacher"),
        ("student", ["--negative-prompt", ""], "--negative-prompt needs a teacher"),
        ("student", ["--text", "/nowhere"], "--text: /nowhere is neither"),
        ("student", ["--codec", "/nowhere"], "--codec: /nowhere does not exist; give a codec.npz, .* vae/"),
        ("pupil", [], "--checkpoint: .*/pupil: no such folder; give the --workdir of a training command"),
        (".", [], "--checkpoint: .* holds no run"),
        ("teacher", ["--frames", "9999999"], "--frames: 9999999 frames need more than .* GiB .* there are"),
    ],
)
def test_bad_arguments_of_sample_leave_nothing(finished, tmp_path, run, arguments, message):
    with pytest.raises(UserError, match=message):
        _sample(finished / run, "--frames", 6, "--output", tmp_path / "out.mp4", *arguments)
    assert not list(tmp_path.iterdir())


def test_a_switch_outside_the_video_is_refused_before_any_work(finished, tmp_path, monkeypatch):
    monkeypatch.setattr(sample, "_load", None)
    message = r"--switch: frame 6 lies outside the video of 6 frames; choose 1 to 5, or make more than 6$"
    with pytest.raises(UserError, match=message):
        _sample(finished / "student", "--frames", 6, "--switch", "6:a blue circle", "--output", tmp_path / "new/x.mp4")
    assert not list(tmp_path.iterdir())


def test_a_teacher_makes_its_training_length_and_warns_of_more(finished, tmp_path, capsys):
    _sample(finished / "teacher", "--output", tmp_path / "as_trained.mp4")
    assert "warning" not in capsys.readouterr().err and len(list(read_frames(tmp_path / "as_trained.mp4"))) == 8
    _sample(finished / "teacher", "--frames", 9, "--output", tmp_path / "longer.mp4")
    assert "warning: --frames 9: this teacher was trained on 8;" in capsys.readouterr().err
    assert len(list(read_frames(tmp_path / "longer.mp4"))) == 9


def test_a_teacher_that_the_device_cannot_hold_is_one_line(finished, tmp_path, monkeypatch):
    def exhausted(*_, **__):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes.")

    monkeypatch.setattr(TeacherSampler, "denoise", exhausted)
    with pytest.raises(UserError, match="--frames: 1 times 8 frames do not fit into the memory of the device"):
        _sample(finished / "teacher", "--output", tmp_path / "out.mp4")
    assert not list(tmp_path.iterdir())


def test_a_codec_that_moved_is_named_with_the_file_that_wants_it(finished, tmp_path):
    run, wanted = tmp_path / "run", tmp_path / "gone" / "vae"
    shutil.copytree(finished / "student", run)
    shutil.move(run / "codec.npz", tmp_path / "codec.npz")
    (run / "codec.json").write_text(json.dumps({"vae": str(wanted), "dtype": "float32"}))
    options = ["--frames", 3, "--output", tmp_path / "out.mp4"]
    with pytest.raises(UserError, match=r"^--checkpoint: .*codec.json names the VAE .*gone/vae.* itself as the codec"):
        _sample(run, *options)
    _sample(run, *options, "--codec", tmp_path / "codec.npz")
    assert len(list(read_frames(tmp_path / "out.mp4"))) == 3


@pytest.mark.parametrize("name", ["out.avi", "out", "out.mp4.txt"])
def test_an_unknown_extension_leaves_no_file(finished, tmp_path, name):
    with pytest.raises(UserError, match="extension .* is unknown; use one of .mp4, .webm, .gif"):
        _sample(finished / "student", "--frames", 6, "--output", tmp_path / name, prompts=PROMPTS)
    assert not list(tmp_path.iterdir())


# --- evaluate ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "teacher, pupil, message",
    [
        ("student", "teacher", "--teacher: .*/student holds a student; give the run directory of a teacher"),
        ("teacher", "teacher", "--student: .*/teacher holds a teacher; give the run directory of a student"),
        ("nothing", "student", "--teacher: .*/nothing holds no run"),
        ("teacher", "nothing", "--student: .*/nothing holds no run"),
    ],
)
def test_bad_arguments_of_evaluate_leave_nothing(finished, tmp_path, teacher, pupil, message):
    with pytest.raises(UserError, match=message):
        runs = ["--teacher", finished / teacher, "--student", finished / pupil]
        evaluation.main([*map(str, runs), "--output", str(tmp_path / "report"), "--videos", "2"])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "option, value, message",
    [
        ("--videos", "0", "--videos: it is 0; it must be at least 1"),
        ("--more", "nothing", "--more: 'nothing': give NAME=DIR"),
        ("--more", "=nothing", "--more: '' cannot be the row of nothing"),
        ("--more", "data=nothing", "--more: 'data' cannot be the row of nothing.* OTHER"),
        ("--more", "second=nothing", "--more: second: nothing holds no run"),
        ("--more", "second={}/teacher", "--more: second: .*/teacher holds a teacher"),
        ("--output", "{}/job/x", "--output: .*/job/x cannot be written"),
    ],
)
def test_errors_of_evaluate_name_the_option(finished, tmp_path, option, value, message):
    given = ["--teacher", str(finished / "teacher"), "--student", str(finished / "student")]
    output = [] if option == "--output" else ["--output", str(tmp_path / "report")]
    with pytest.raises(UserError, match=message):
        evaluation.main([*given, *output, option, value.format(finished)])
    assert not list(tmp_path.iterdir())


def test_runs_that_evaluate_cannot_compare_are_both_named(finished, tmp_path, monkeypatch):
    load = Run.load

    def other_data(directory, **options):
        run = load(directory, **options)
        return dataclasses.replace(run, latent_shape=(16, 4, 4, 16)) if Path(directory).name == "stage2" else run

    monkeypatch.setattr(Run, "load", other_data)
    message = r"stage2=.* was trained on moving_shapes \(16x4x4x16\), the teacher .* on moving_shapes \(8x4x4x16\)"
    with pytest.raises(UserError, match=message):
        evaluate(finished / "teacher", finished / "student", tmp_path / "x", more={"stage2": finished / "stage2"})
    assert not list(tmp_path.iterdir())


# --- bad input on the command line ------------------------------------------------------------------------------------


def _clips(tmp_path, *, captions="clip,caption\na.mp4,grey\n", good=True):
    (tmp_path / "clips").mkdir()
    if good:
        with VideoWriter(tmp_path / "clips/a.mp4") as writer:
            for t in range(4):
                writer.write(np.full((16, 16, 3), 40 * t, np.uint8))
    else:
        (tmp_path / "clips/a.mp4").write_bytes(np.random.default_rng(0).bytes(3000))
    (tmp_path / "captions.csv").write_text(captions)
    return ["--clips", str(tmp_path / "clips"), "--captions", str(tmp_path / "captions.csv")]


def _refused(capsys, *arguments):
    assert exit_code(quickstart.main, *arguments) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    (line,) = (line for line in error.splitlines() if line.startswith("error:"))
    return line


@pytest.mark.subprocesses
def test_a_workdir_that_cannot_be_written(subprocess_env):
    command = [sys.executable, "-m", "greedy_distill_jax.quickstart", "--workdir", "/proc/x"]
    done = subprocess.run(command, env=subprocess_env, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("error:"))
    assert "--workdir: /proc/x cannot be written" in line


@pytest.mark.parametrize("given", [slice(0, 2), slice(2, 4)], ids=["clips", "captions"])
def test_clips_and_captions_belong_together(tmp_path, given):
    with pytest.raises(UserError, match="--clips: clips and captions belong together"):
        quickstart.main(["--smoke", "--workdir", str(tmp_path / "run"), *_clips(tmp_path)[given]])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(good=False), "none of the 1 clips gives a window.*does not decode"),
        (dict(captions="clip,text\na.mp4,grey\n"), "no column 'caption'.*clip,caption"),
        (dict(captions="clip,caption\nb.mp4,grey\n"), "names 'b.mp4', which is not in"),
        (dict(captions="clip,caption\n"), "no caption for 'a.mp4'"),
    ],
)
def test_clips_that_cannot_be_used_leave_nothing(tmp_path, options, message):
    _, clips, _, captions = _clips(tmp_path, **options)
    with pytest.raises(UserError, match=message):
        quickstart.quickstart(tmp_path / "run", clips=Path(clips), captions=Path(captions), speed="smoke")
    assert not list((tmp_path / "run").iterdir()), "the next attempt, perhaps with another folder, starts from nothing"


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(good=False), "none of the 1 clips gives a window"),
        (dict(captions="clip,text\na.mp4,grey\n"), "no column 'caption'"),
    ],
)
def test_clips_that_cannot_be_used_are_one_line(capsys, tmp_path, options, message):
    assert message in _refused(capsys, "--workdir", tmp_path / "run", *_clips(tmp_path, **options))
    assert not (tmp_path / "run").exists()
