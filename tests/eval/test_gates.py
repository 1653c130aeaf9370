"""The gates of a trained pair: real videos pass them, every control fails the gate that is about it."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from greedy_distill_jax.config import read_settings
from greedy_distill_jax.data.sources.moving_shapes import MovingShapes
from greedy_distill_jax.data.sources.registry import load_source
from greedy_distill_jax.eval import gates
from greedy_distill_jax.eval.metrics import evaluate_videos
from greedy_distill_jax.eval.time_per_frame import cost_gate
from greedy_distill_jax.models.students.etm_sdd import Student
from greedy_distill_jax.runs.run import Run
from greedy_distill_jax.testing import tiny
from greedy_distill_jax.text.hashed_words import HashWordEncoder

FRAMES, LONG, COUNT = 8, 64, 48
OPPOSITE = {"left": "right", "right": "left", "up": "down", "down": "up"}


def _drawn(frames, seed):
    source = MovingShapes(frames=frames, split="held_out", seed=seed)
    items = [source[i] for i in range(COUNT)]
    return np.stack([item["video"] for item in items]), [item["caption"] for item in items]


@pytest.fixture(scope="module")
def codec():
    return load_source("moving_shapes")[1]


@pytest.fixture(scope="module")
def reference():
    return _drawn(LONG, 2)[0]


@pytest.fixture(scope="module")
def teacher(codec):
    """(videos of the training length, captions): a perfect teacher, seen through the codec."""
    video, captions = _drawn(FRAMES, 1)
    return codec.decode(codec.encode(video)), captions


@pytest.fixture(scope="module")
def student(codec):
    """(videos of 8 times that length, captions): a perfect student."""
    video, captions = _drawn(LONG, 3)
    return codec.decode(codec.encode(video)), captions


@pytest.fixture(scope="module")
def rows(teacher, student, reference):
    return _row(*teacher, reference), _row(*student, reference)


def _row(video, captions, reference):
    return evaluate_videos(video, captions, window=FRAMES, reference_VTHWC=reference)


def _passed(teacher_row, student_row):
    return [gate["passed"] for gate in gates.quality_gates(teacher_row, student_row)]


def test_real_videos_pass_every_gate(rows):
    assert _passed(*rows) == [True, True, True]
    for gate in gates.quality_gates(*rows):
        assert set(gate) == {"name", "value", "threshold", "passed"} and isinstance(gate["passed"], bool)


def test_permuted_captions_fail(rows, teacher, student, reference):
    def permuted(video, captions):
        order = np.random.default_rng(0).permutation(len(captions))
        return _row(video, [captions[i] for i in order], reference)

    assert permuted(*teacher)["direction"] < 0.6
    assert not _passed(permuted(*teacher), rows[1])[0]
    assert not _passed(rows[0], permuted(*student))[1]


def test_opposite_directions_fail_the_direction_gate_alone(rows, teacher, reference):
    video, captions = teacher
    turned = [caption.replace(word := caption.split()[-1], OPPOSITE[word]) for caption in captions]
    assert _passed(_row(video, turned, reference), rows[1]) == [False, True, True]


def test_a_frozen_first_frame_fails_the_direction_gate_alone(rows, teacher, reference):
    video, captions = teacher
    frozen = np.repeat(video[:, :1], FRAMES, axis=1)
    assert _passed(_row(frozen, captions, reference), rows[1]) == [False, True, True]


def test_a_stream_that_fades_fails_the_last_gate_alone(rows, student, reference):
    video, captions = student
    faded = video.copy()
    faded[: COUNT // 4, LONG // 2 :] = 20
    assert _passed(rows[0], _row(faded, captions, reference)) == [True, True, False]


def test_an_untrained_student_fails(rows, student, codec, reference):
    captions = student[1][:12]
    config = tiny.train_config("teacher_forcing", data__frames=FRAMES, student__rope_frames=FRAMES)
    settings = read_settings(config)
    model = Student(settings.student_config)
    shape = (FRAMES, *codec.latent_shape(16, 16))
    params = jax.jit(lambda key: model.init(key, shape))(jax.random.key(0))
    encoder = HashWordEncoder(config.model.text_len, config.model.text_dim)
    run = Run(settings, model, params, codec, encoder, shape, {})
    video = run.sample_videos(captions, frames=LONG)
    assert _passed(rows[0], _row(video, captions, reference[:12])) == [True, False, False]


@pytest.mark.parametrize("bad", [0.0, float("nan")])
def test_values_that_are_nothing_do_not_pass(bad):
    good = {"direction": 1.0, "valid_first": 1.0, "valid_last": 1.0}
    nothing = dict.fromkeys(good, bad)
    assert _passed(nothing, good)[0] is False
    assert _passed(good, nothing)[1:] == [False, False]


def test_the_student_may_lose_five_points_and_a_tenth():
    teacher = {"direction": 0.95, "valid_first": 0.9, "valid_last": None}
    assert _passed(teacher, {"valid_first": 0.86, "valid_last": 0.78}) == [True, True, True]
    assert _passed(teacher, {"valid_first": 0.84, "valid_last": 0.84}) == [True, False, True]
    assert _passed(teacher | {"direction": 0.94}, {"valid_first": 0.9, "valid_last": 0.8}) == [False, True, False]


@pytest.mark.parametrize("late, passed", [(1.0, True), (1.09, True), (1.12, False), (8.0, False)])
def test_the_cost_gate_compares_two_lengths(late, passed):
    times = [{"frames": n, "etm_sdd": ms, "full_causal": 9.0, "teacher": 9.0} for n, ms in ((32, 1.0), (128, 7.0))]
    times.append({"frames": 256, "etm_sdd": late, "full_causal": 1.0, "teacher": 1.0})
    gate = cost_gate(times, 32, 256)
    assert gate["passed"] is passed and gate["value"] == late and "256" in gate["name"]


# --- stage 2 ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def blurred(student, reference):
    """A stage 1 whose few steps cost sharpness."""
    video = student[0].astype(np.float32)
    soft = (video + np.roll(video, 1, 2) + np.roll(video, 1, 3) + np.roll(video, 1, 1)) / 4
    return _row(soft.astype(np.uint8), student[1], reference)


@pytest.fixture(scope="module")
def data(reference):
    return _row(*_drawn(LONG, 5), reference)


def _stage2(row, blurred, data):
    return [gate["passed"] for gate in gates.stage2_gates(row, blurred, data)]


def test_real_streams_pass_the_gates_of_stage_2(rows, blurred, data):
    assert _stage2(rows[1], blurred, data) == [True] * 4
    assert _stage2(blurred, blurred, data)[:2] == [False, False]


def test_a_repeated_frame_and_noise_fail_the_gates_of_stage_2(student, reference, blurred, data):
    video, captions = student
    frozen = np.repeat(video[:, :1], LONG, axis=1)
    assert _stage2(_row(frozen, captions, reference), blurred, data) == [False] * 4
    noise = np.random.default_rng(0).integers(0, 256, video.shape).astype(np.uint8)
    assert False in _stage2(_row(noise, captions, reference), blurred, data)


@pytest.mark.parametrize(
    "change, passed",
    [
        ({}, [True, True, True, True]),
        ({"fd_first": 0.08}, [False, True, True, True]),  # their mean would pass
        ({"fd_last": 0.18}, [True, False, True, True]),
        ({"step_std": 0.4, "step_std_last": 0.6}, [True, True, False, True]),
        ({"step_std": 0.7, "step_std_last": 0.29}, [True, True, True, False]),
        ({"step_std": 0.8, "step_std_last": 0.4}, [True, True, False, True]),
        ({"step_std": float("nan")}, [True, True, False, True]),
        ({"step_std_last": float("nan")}, [True, True, True, False]),
    ],
)
def test_no_window_hides_behind_the_other(change, passed):
    stage1 = {"fd_first": 0.1, "fd_last": 0.2, "step_std": 0.5, "step_std_last": 0.5}
    real = {"fd_first": 0.01, "fd_last": 0.01, "step_std": 0.6, "step_std_last": 0.6}
    good = {"fd_first": 0.02, "fd_last": 0.03, "step_std": 0.6, "step_std_last": 0.6}
    assert _stage2(good | change, stage1, real) == passed


@pytest.mark.parametrize(
    "change, passed",
    [
        ({}, [True, True, True]),
        ({"fd_last": 0.095}, [False, True, True]),
        ({"step_std_last": 0.32}, [True, False, True]),
        ({"step_std_last": float("nan")}, [True, False, True]),
        ({"valid_last": 0.7}, [True, True, False]),
    ],
)
def test_stage_3_moves_on_and_stays_well_formed(change, passed):
    stage2 = {"fd_last": 0.1, "step_std_last": 0.3, "valid_last": 0.9}
    real = {"fd_last": 0.01, "step_std_last": 0.6, "valid_last": 1.0}
    good = {"fd_last": 0.05, "step_std_last": 0.4, "valid_last": 0.8}
    assert [gate["passed"] for gate in gates.stage3_gates(good | change, stage2, real)] == passed
    assert [gate["passed"] for gate in gates.stage3_gates(stage2, stage2, real)] == [False, False, True]
    still = stage2 | {"step_std_last": 0.0}
    assert [gate["passed"] for gate in gates.stage3_gates(good | change, still, real)][1] is False


@pytest.mark.parametrize("run", ["2026-11-21", "2026-11-28", "2026-11-29"])
def test_the_committed_runs_pass_and_their_controls_fail(run):
    stored = Path(__file__).parents[2] / f"benchmarks/results/{run}-cpu-quickstart.json"
    rows = {row["name"]: row for row in json.loads(stored.read_text(encoding="utf-8"))["rows"]}
    passed = {
        name: _stage2(rows[name], rows["stage1_few_steps"], rows["data"])
        for name in ("stage2", "stage1_control", "stage2_fake_self", "stage1_few_steps")
    }
    assert passed.pop("stage2") == [True] * 4
    if "stage3" in rows:
        assert [gate["passed"] for gate in gates.stage3_gates(rows["stage3"], rows["stage2"], rows["data"])] == [
            True
        ] * 3
    assert all(False in gates for gates in passed.values()), passed
