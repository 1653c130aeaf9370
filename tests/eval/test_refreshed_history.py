"""The cache or the denoiser: rows on real history through the command, and verdicts on videos whose fault is known."""

import json

import numpy as np
import pytest

from greedy_distill_jax import evaluate as command
from greedy_distill_jax.config import read_settings
from greedy_distill_jax.data.sources.moving_shapes import MovingShapes
from greedy_distill_jax.data.sources.registry import load_source
from greedy_distill_jax.errors import UserError
from greedy_distill_jax.eval import histories, oracle, suites
from greedy_distill_jax.eval.comparison import Comparison, Entry
from greedy_distill_jax.eval.evaluation import loss_plots
from greedy_distill_jax.eval.metrics import standard_error
from greedy_distill_jax.eval.refreshed_history import share_of
from greedy_distill_jax.models.students.etm_sdd import Student
from greedy_distill_jax.models.wan.dit import Teacher
from greedy_distill_jax.runs.run import Run
from greedy_distill_jax.testing import tiny
from greedy_distill_jax.text.hashed_words import HashWordEncoder

FRAMES, LONG, VIDEOS = 4, 32, 3
ARGUMENTS = ("--teacher", "runs/teacher", "--student", "runs/student", "--videos", str(VIDEOS))


@pytest.fixture(scope="module")
def runs():
    """A teacher and a student that were never trained, of wandering shapes."""
    codec = load_source("moving_shapes:wandering")[1]
    shape = (FRAMES, *codec.latent_shape(16, 16))

    def run(stage, make, **changes):
        config = tiny.train_config(
            stage, data__source="moving_shapes:wandering", data__frames=FRAMES, sample__steps=1, **changes
        )
        settings = read_settings(config)
        model = make(settings)
        encoder = HashWordEncoder(settings.wan.text_len, settings.wan.text_dim)
        meta = {"train_cpu_s": 1.5, "steps": 0}
        return Run(settings, model, tiny.random_params(model, latent_shape=shape), codec, encoder, shape, meta)

    student = run(
        "teacher_forcing", lambda s: Student(s.student_config), student__rope_frames=FRAMES, sample__guidance=1.0
    )
    return {"teacher": run("teacher", lambda s: Teacher(s.wan)), "student": student}


@pytest.fixture(scope="module")
def real():
    """(videos of wandering shapes, captions)."""
    source = MovingShapes(frames=LONG, split="held_out", motion="wandering")
    items = [source[i] for i in range(VIDEOS)]
    return np.stack([item["video"] for item in items]), [item["caption"] for item in items]


def test_the_command_has_two_rows_more_for_every_row_of_a_student(runs, monkeypatch, tmp_path):
    monkeypatch.setattr(Run, "load", lambda directory: runs[directory.split("/")[1]])
    seen, measure = [], suites.measure
    monkeypatch.setattr("greedy_distill_jax.eval.evaluation.measure", lambda *a: seen.append(a[1]) or measure(*a))
    command.main([*ARGUMENTS, "--output", str(tmp_path), "--refresh-history", "2", "--suite", "refreshed_history"])
    metrics = json.loads((tmp_path / "metrics.json").read_text(encoding="utf-8"))
    students = ("stage1", "stage1_few_steps")
    more = [f"{name}, {kind}" for name in students for kind in ("real start", "refreshed history")]
    assert [row["name"] for row in metrics["rows"]] == ["data", "teacher", *students, *more]
    table = metrics["tables"]["refreshed_history"]
    assert [(row["stream"], row["figure"]) for row in table] == [
        (f"{name}, real start", figure) for name in students for figure in ("valid frames", "quality", "colour kept")
    ]
    assert all(sentence in metrics["extra"]["notes"]["refreshed_history"] for sentence in more[::2])
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "The cache or the denoiser" in page and "all history real but for its own last 2 chunks" in page
    entries, codec = seen[0].entries, runs["student"].codec
    own, other = (entries[name].video_VTHWC for name in more[:2])
    shown = codec.decode(codec.encode(entries["data"].video_VTHWC))
    for video in (own, other):
        assert video.shape == shown.shape and np.array_equal(video[:, :FRAMES], shown[:, :FRAMES])
    assert np.array_equal(own[:, : FRAMES + 3], other[:, : FRAMES + 3]) and not np.array_equal(own, other)
    assert [plot.title for plot in loss_plots(seen[0])] == ["Stage teacher", "Stage stage1"]


def test_history_that_cannot_be_refreshed(runs, real, monkeypatch, tmp_path):
    monkeypatch.setattr(Run, "load", lambda directory: runs[directory.split("/")[1]])
    with pytest.raises(UserError, match="--refresh-history: it is -1; it must be at least 0"):
        command.main([*ARGUMENTS, "--output", str(tmp_path), "--refresh-history=-1"])
    with pytest.raises(UserError, match="--refresh-history: 27 last chunks stay of the 28 that stage1 makes.* 26"):
        command.main([*ARGUMENTS, "--output", str(tmp_path), "--refresh-history", "27"])

    def refuse(*args):
        raise UserError("clips:DIR holds windows of 4 frames.")

    for found, told in ((refuse, "holds windows of 4 frames"), (lambda *args: (real[0][:, :8], []), "gave 8")):
        monkeypatch.setattr(histories, "held_out_videos", found)
        with pytest.raises(UserError, match=f"--refresh-history: histories need real videos of 32 frames.*{told}"):
            command.main([*ARGUMENTS, "--output", str(tmp_path), "--refresh-history"])
    entries = {"data": Entry("data", real[0])}
    comparison = Comparison(entries, real[1], runs["teacher"], runs["student"], 1, 0)
    with pytest.raises(UserError, match="have other captions"):
        histories.with_real_histories(comparison, histories.Histories(np.zeros((1, 1, 1, 1, 1), np.float32), ["a"], 1))


def test_real_frames_are_redrawn_as_they_are_and_others_as_they_should_be(real):
    video, captions = real
    shape_V, rgb_V3 = oracle.captioned(captions, VIDEOS)[:, 0], oracle.read(video).rgb_VT3.mean(1)
    assert np.abs(oracle.redrawn(video, shape_V, rgb_V3).astype(int) - video).max() <= 25  # of 255, at edges
    faded = (video * 0.7 + 20 * 0.3).astype(np.uint8)
    assert np.abs(faded.astype(int) - video).max() > 40
    assert np.abs(oracle.redrawn(faded, shape_V, rgb_V3).astype(int) - video).max() <= 25


def test_the_share_that_returns():
    random = np.random.default_rng(0)
    lost = 1.0 + 0.1 * random.standard_normal(64)
    noise = 0.1 * random.standard_normal(64)
    for share, verdict in ((0.9, "the cache"), (0.1, "the denoiser"), (-0.5, "the denoiser"), (0.5, "open")):
        found = share_of(lost, share * lost + noise)
        assert found.verdict == verdict and found.share == pytest.approx(share, abs=0.05)
        # A share is a ratio of means: without error where all videos agree on it, else that of the rest.
        assert found.share_se == pytest.approx(standard_error(noise), rel=0.1)
        assert share_of(lost, share * lost).share_se == pytest.approx(0.0, abs=1e-12)
    for nothing in (np.zeros(64), noise, -lost, lost[:1]):
        found = share_of(nothing, lost[: len(nothing)])
        assert (found.share, found.share_se, found.verdict) == (None, None, "nothing was lost")


def test_verdicts_on_videos_whose_fault_is_known(runs, real):
    video, captions = real
    # Colour is lost slowly, by one video more than by the other: a loss with an error.
    fade = np.outer(np.linspace(0.3, 0.6, VIDEOS), np.linspace(-0.5, 1, LONG).clip(0))[..., None, None, None]
    faded = (video * (1 - fade) + 20 * fade).astype(np.uint8)

    def entries(own, refreshed):
        pair = [Entry("own", own), Entry("refreshed", refreshed, own_history="own")]
        return {entry.name: entry for entry in (Entry("data", video), *pair)}

    def verdicts(own, refreshed):
        comparison = Comparison(entries(own, refreshed), captions, runs["teacher"], runs["student"], 1, 0)
        suite = suites.resolve("refreshed_history")
        assert suite.applies(comparison)
        found = suites.measure(suite, comparison)
        return {row["figure"]: row for row in found.rows}["colour kept"], found.note

    row, note = verdicts(faded, video)
    assert row["verdict"] == "the cache" and row["share"] == pytest.approx(1.0, abs=0.15) and row["lost"] > 0.05
    assert "own: with real history" in note and "of the loss of colour kept returns: the cache" in note
    row, note = verdicts(faded, faded)
    assert row["verdict"] == "the denoiser" and row["share"] == 0.0 == row["returned"]
    row, note = verdicts(video, faded)
    assert (
        row["share"] == "\N{EN DASH}"
        and note == "own: nothing was lost of valid frames, quality, colour kept."
        and row["returned"] < 0
    )
    plain = Comparison({"data": Entry("data", video)}, captions, runs["teacher"], runs["student"], 1, 0)
    assert not suites.resolve("refreshed_history").applies(plain)
