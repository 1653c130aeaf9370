"""Suites: one from outside the package is measured, judged, drawn and stored like the package's own."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from greedy_distill_jax import evaluate as command
from greedy_distill_jax.config import read_settings
from greedy_distill_jax.data.sources.moving_shapes import MovingShapes
from greedy_distill_jax.data.sources.registry import load_source
from greedy_distill_jax.errors import UserError
from greedy_distill_jax.eval import suites
from greedy_distill_jax.eval.comparison import Comparison, Entry
from greedy_distill_jax.eval.evaluation import evaluate, loss_plots
from greedy_distill_jax.eval.suites import Column, Measured, Suite
from greedy_distill_jax.models.students.etm_sdd import Student
from greedy_distill_jax.models.wan.dit import Teacher
from greedy_distill_jax.runs.run import Run
from greedy_distill_jax.testing import tiny
from greedy_distill_jax.text.hashed_words import HashWordEncoder

OUTSIDE = f"{Path(__file__).parent / 'brightness.py'}:SUITE"
FRAMES, NAMES = 4, ["data", "teacher", "stage1", "stage1_few_steps"]


@pytest.fixture(scope="module")
def runs():
    """A teacher and a student that were never trained, by the folder they would lie in."""
    codec = load_source("moving_shapes")[1]
    shape = (FRAMES, *codec.latent_shape(16, 16))

    def run(config, make):
        settings = read_settings(config)
        model = make(settings)
        params = tiny.random_params(model, latent_shape=shape)
        encoder = HashWordEncoder(settings.wan.text_len, settings.wan.text_dim)
        return Run(settings, model, params, codec, encoder, shape, {"train_cpu_s": 1.5, "steps": 0})

    teacher = tiny.train_config("teacher", data__frames=FRAMES, sample__steps=1)
    student = tiny.train_config(
        "teacher_forcing", data__frames=FRAMES, student__rope_frames=FRAMES, sample__steps=1, sample__guidance=1.0
    )
    return {
        "runs/teacher": run(teacher, lambda settings: Teacher(settings.wan)),
        "runs/student": run(student, lambda settings: Student(settings.student_config)),
    }


@pytest.fixture
def loaded(runs, monkeypatch):
    """``Run.load`` gives these runs."""
    monkeypatch.setattr(Run, "load", lambda directory: runs[str(directory)])


@pytest.fixture
def registry(monkeypatch):
    """What a test registers is forgotten after it."""
    monkeypatch.setattr(suites, "_REGISTERED", {})


ARGUMENTS = ("--teacher", "runs/teacher", "--student", "runs/student", "--videos", "3")


def test_a_suite_from_a_file_through_the_command(loaded, tmp_path, capsys):
    command.main([*ARGUMENTS, "--output", str(tmp_path), "--suite", OUTSIDE])
    metrics = json.loads((tmp_path / "metrics.json").read_text(encoding="utf-8"))
    assert [row["name"] for row in metrics["rows"]] == NAMES
    names = ["name", "steps", "brightness", "train_cpu_s", "train_seed"]
    assert all(list(row) == names and row["brightness"] > 0 for row in metrics["rows"])
    assert [column["name"] for column in metrics["columns"]["rows"]] == names and metrics["tables"] == {}
    (gate,) = metrics["gates"]
    assert gate["name"] == "the student is not black" and gate["passed"] in (True, False)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    for text in (
        "Brightness, of 255",
        "Does the light stay on?",
        "Brightness by frame",
        "Means over all pixels.",
        "Close to the data row is best.",
    ):
        assert text in page, text
    assert "Fréchet" not in page and "Full-causal" not in page
    assert metrics["rows"][0]["train_seed"] == "\N{EN DASH}" and metrics["rows"][1]["train_seed"] == 0
    assert metrics["extra"]["evaluation_seed"] == 1000 and set(metrics["extra"]["names"]) == set(NAMES)
    for text in (
        "3 held-out videos per row, drawn with evaluation seed 1000.",
        "Real videos that no run was trained on.",
        "The bidirectional teacher, 1 steps for a whole video; run teacher.",
        "The same student with few steps, as the further students are sampled: 1 per frame; stage teacher_forcing",
    ):
        assert text in page, text
    said = capsys.readouterr().out
    assert "evaluate: brightness" in said and "the student is not black" in said


def test_a_registered_suite_has_a_table_of_its_own(loaded, registry, tmp_path):
    columns = (
        Column("layer", "Layer", format="count"),
        Column("reach", "Reach", unit="frames", better="higher"),
        Column("never", "Never measured"),
    )
    rows = [{"layer": 0, "reach": 1.5}, {"layer": 1}]
    suite = suites.register(
        Suite("locality", "Locality", "How far attention reaches.", columns, lambda comparison: Measured(rows))
    )
    assert suites.resolve("locality") is suite and suites.suite_names()[-1] == "locality"
    metrics = evaluate("runs/teacher", "runs/student", tmp_path, videos=2, suites=["locality"])
    assert metrics["tables"] == {"locality": [{"layer": 0, "reach": 1.5}, {"layer": 1, "reach": None}]}
    assert "not yet measured" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_a_suite_that_does_not_apply_is_refused_by_name_and_left_out_otherwise(loaded, registry, monkeypatch, tmp_path):
    monkeypatch.setattr(suites, "_FILES", ())
    never = Suite("never", "Never", "", (), lambda comparison: Measured([]), applies=lambda comparison: False)
    suites.register(never)
    with pytest.raises(UserError, match="never does not apply to runs on moving_shapes") as error:
        evaluate("runs/teacher", "runs/student", tmp_path, videos=2, suites=["never"])
    assert error.value.field == "suites"
    assert evaluate("runs/teacher", "runs/student", tmp_path, videos=2)["tables"] == {}


@pytest.mark.parametrize(
    "name, message",
    [
        ("nothing", "--suite: 'nothing' is no suite; choose from moving_shapes, refreshed_history, next_frame, time_p"),
        ("nothing.py:SUITE", "--suite: 'nothing.py:SUITE' cannot be loaded"),
        (OUTSIDE + "S", "--suite: .*brightness.py:SUITES' cannot be loaded"),
        (OUTSIDE.replace("SUITE", "NO_SUITE"), "--suite: .*NO_SUITE' is a str; give an eval.suites.Suite"),
    ],
)
def test_errors_of_suites_name_the_option(tmp_path, name, message):
    with pytest.raises(UserError, match=message):
        command.main([*ARGUMENTS, "--output", str(tmp_path / "report"), "--suite", name])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", suites.suite_names())
def test_the_packages_own_suites_are_called_like_their_files(name):
    suite = suites.resolve(name)
    assert suite.name == name and suite.columns and suite.title and suite.text


@pytest.mark.parametrize("change", [dict(format="percent"), dict(better="more")])
def test_a_column_of_an_unknown_kind(change):
    with pytest.raises(ValueError, match="must be one of"):
        dataclasses.replace(Column("a", "A"), **change)


@pytest.fixture(scope="module")
def compared(runs):
    """A comparison with two rows."""
    video = np.zeros((1, 2, 8, 8, 3), np.uint8)
    entries = {name: Entry(name, video) for name in ("data", "teacher")}
    return Comparison(entries, ["a red square"], runs["runs/teacher"], runs["runs/student"], 1, 0)


def suite_of(found):
    """A suite of models that finds this."""
    return Suite("mine", "Mine", "", (Column("speed", "Speed"),), lambda comparison: found, of_models=True)


def with_rows(rows):
    """What was measured, with rows that the annotations of tests would not let pass."""
    found = Measured([])
    object.__setattr__(found, "rows", rows)
    return found


@pytest.mark.parametrize(
    "found, said",
    [
        ([{"name": "data"}], "returned a list; return an eval.suites.Measured"),
        (with_rows(["data"]), "returned rows that are no dictionaries"),
        (Measured([{"name": "data", "sped": 1}]), "returned 'sped', which is none of its columns"),
        (
            Measured([{"name": "stage9", "speed": 1}]),
            "returned a row named 'stage9'; of_models has a row per entry",
        ),
        (Measured([{"speed": 1}]), "returned a row named None"),
    ],
)
def test_what_a_suite_must_return(compared, found, said):
    with pytest.raises(UserError, match=rf"^suite 'mine': measure\(\) {said}") as error:
        suites.measure(suite_of(found), compared)
    assert error.value.field == "suites"
    good = Measured([{"name": "data", "speed": 1}, {"name": "teacher"}])
    assert suites.measure(suite_of(good), compared) is good


@pytest.mark.parametrize("gates", [None, [{"name": "fast"}], ["fast"], "fast"])
def test_what_gates_must_be(compared, gates):
    suite = suite_of(Measured([]))
    suite = dataclasses.replace(suite, gates=lambda measured, comparison: gates)
    with pytest.raises(UserError, match=r"suite 'mine': gates\(\) returned .*; return a list of gates.gate"):
        suites.claims_of(suite, Measured([]), compared)


def test_a_line_has_a_value_for_every_position():
    with pytest.raises(ValueError, match="plot 'Time': 'ours' has 2 values for 3 positions"):
        suites.Plot("Time", "", "x", "y", {"ours": [1, 2]}, x=[1, 2, 3])


def test_a_teacher_has_no_last_window_and_the_critic_is_drawn(runs, tmp_path):
    """What moving_shapes finds of real videos, of as many frames as a teacher's and as a student's."""
    source = MovingShapes(frames=8 * FRAMES, split="held_out")
    items = [source[i] for i in range(6)]
    video, captions = np.stack([item["video"] for item in items]), [item["caption"] for item in items]
    distilled = dataclasses.replace(runs["runs/student"], settings=read_settings(tiny.train_config("dmd")))
    log = [{"step": 2, "dmd/critic/flow_matching": 3.0}, {"step": 4, "dmd/dmd": 1.0, "dmd/critic/flow_matching": 2.0}]
    (tmp_path / "scalars.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in log))
    teacher, student = runs["runs/teacher"], runs["runs/student"]
    entries = {
        "data": Entry("data", video),
        "teacher": Entry("teacher", video[:, :FRAMES], teacher, tmp_path / "no log"),
        "stage2": Entry("stage2", video, distilled, tmp_path),
        "black": Entry("black", np.zeros_like(video)),
    }
    comparison = Comparison(entries, captions, teacher, student, 1, 0)
    rows = suites.measure(suites.resolve("moving_shapes"), comparison).rows
    data, of_teacher, stage2, black = rows
    assert [of_teacher[name] for name in ("valid_last", "fd_last", "step_std_last")] == ["\N{EN DASH}"] * 3
    assert of_teacher["valid_last_se"] is None and of_teacher["valid_first_se"] == 0.0 == stage2["valid_last_se"]
    assert data == {**stage2, "name": "data"} and 0 < data["flicker_se"] < data["flicker"]
    # Without a valid frame there is no motion: measured, and nothing.
    assert [black[name] for name in ("step_std", "step_std_last", "wobble")] == ["\N{EN DASH}"] * 3
    same = {"name": "stage1_few_steps"}
    measured = suites.Measured(
        [data, stage2 | {"name": "stage1"}, of_teacher, stage2 | same, black | {"name": "stage2"}]
    )
    claims = suites.resolve("moving_shapes").gates(measured, comparison)
    assert [claim["passed"] for claim in claims[-4:]] == [False] * 4

    empty, plot = loss_plots(comparison)
    assert empty.lines == {} and plot.x == [2, 4]
    assert plot.lines == {"dmd": [None, 1.0], "critic/flow_matching": [3.0, 2.0]}
