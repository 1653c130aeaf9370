"""The causal student through the commands: trained from a teacher, loaded, streamed, evaluated; refused configs."""

import json

import jax
import numpy as np
import pytest

from greedy_distill_jax import sample
from greedy_distill_jax.cli.config_flags import read_config
from greedy_distill_jax.config import read_settings
from greedy_distill_jax.data.video_io import probe
from greedy_distill_jax.errors import UserError
from greedy_distill_jax.eval.evaluation import evaluate
from greedy_distill_jax.models.students.causal import CausalStudent
from greedy_distill_jax.runs.run import Run
from greedy_distill_jax.storage.checkpoint import load_meta
from greedy_distill_jax.streaming.causal import CausalStreamer
from greedy_distill_jax.testing import tiny
from greedy_distill_jax.train import train


def _config(**changes):
    return tiny.train_config("teacher_forcing", **{"student__kind": "causal"} | changes)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_teacher):
    """Directories of a teacher and of the causal student made from it, a few updates each."""
    root = tmp_path_factory.mktemp("runs")
    (root / "teacher").symlink_to(tiny_teacher)
    config = _config(
        teacher_from=str(root / "teacher"),
        steps=3,
        student__chunk=2,
        student__causal__window=6,
        student__causal__sink=2,
        student__causal__rope_mode="relative",
        student__causal__recache=True,
    )
    config.losses.flow_matching.options.draws = 2
    train(config, root / "student", show_progress=False)
    return root


def test_training_starts_from_the_teacher_and_the_run_loads(runs):
    teacher, student = (Run.load(runs / name) for name in ("teacher", "student"))
    assert isinstance(student.model, CausalStudent) and student.is_student
    assert isinstance(student.streamer(), CausalStreamer)
    assert jax.tree.structure(student.params) == jax.tree.structure(teacher.params)
    pairs = zip(jax.tree.leaves(student.params), jax.tree.leaves(teacher.params), strict=True)
    moved = max(float(np.abs(np.asarray(a) - np.asarray(b)).max()) for a, b in pairs)
    assert 0 < moved < 0.5  # three updates away, not a fresh start
    meta = load_meta(runs / "student" / "checkpoints")
    assert meta["architecture"]["kind"] == "causalstudent" and meta["architecture"]["window"] == 6
    with pytest.raises(UserError, match="architecture"):
        config = tiny.train_config("teacher_forcing", steps=9)
        train(config, runs / "student", show_progress=False)


def test_sample_streams_past_the_window_and_switches_the_prompt(runs, capsys):
    output = runs / "out.mp4"
    arguments = ["--checkpoint", str(runs / "student"), "--prompt", "a red square moving left", "--frames", "12"]
    sample.main([*arguments, "--switch", "8:a blue circle moving up", "--output", str(output)])
    assert probe(output).frames == 12 and "12 frames" in capsys.readouterr().out
    student = Run.load(runs / "student")
    with pytest.raises(UserError, match="chunk of 2 latent frames"):
        student.session(["a red square"]).play(5)


def test_evaluate_times_the_causal_student_under_its_own_name(runs, tmp_path):
    metrics = evaluate(
        runs / "teacher", runs / "student", tmp_path / "report", videos=4, lengths=(8, 16), announce=lambda _: None
    )
    times, caches = metrics["tables"]["time_per_frame"], metrics["tables"]["cache_bytes"]
    assert all(set(row) == {"frames", "causal", "full_causal", "teacher"} for row in times)
    assert "causal student" in metrics["gates"][-1]["name"] and caches[0]["cache"] == "causal, any length"
    assert json.loads((tmp_path / "report" / "metrics.json").read_text())["rows"]
    page = (tmp_path / "report" / "report.html").read_text()
    assert "Causal student" in page and "ETM + SDD (ours)" not in page


def test_context_of_the_last_step_trains_and_samples(tmp_path):
    config = _config(steps=2, student__context="last_step_kv", student__context_noise=0.2, sample__sampler="renoise")
    train(config, tmp_path, show_progress=False)
    run = Run.load(tmp_path)
    assert run.sample_videos(["a red square moving left"], frames=5).shape == (1, 5, 16, 16, 3)
    with pytest.raises(UserError, match="keeps the keys of its last denoising step"):
        run.streamer(steps=3)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(student__kind="casual"), "config.student.kind is 'casual'; it must be one of etm_sdd, causal"),
        (dict(student__fusion="add"), r"config.student.fusion is 'add', but config.student.kind = 'causal'.*'selfkv'"),
        (dict(student__window=12), "config.student.window is 12, but config.student.kind = 'causal'"),
        (dict(student__rope_mode="absolute"), "config.student.rope_mode is 'absolute'"),
        (dict(student__kind="etm_sdd", student__causal__sink=0), "config.student.causal.sink is 0.*'etm_sdd'"),
        (dict(student__causal__rope_mode="fixed"), "CausalConfig.rope_mode is 'fixed'"),
        (dict(student__context="fused"), "CausalConfig.context is 'fused'"),
        (dict(student__chunk=2), "CausalConfig.sink is 3 latent frames"),
        (dict(student__chunk=3, data__frames=4), "does not divide into chunks"),
        (dict(data__frames=3, student__causal__window=0), "CausalConfig.max_frames is 3.*at least 4"),
    ],
)
def test_bad_configs_name_the_key(changes, message):
    with pytest.raises(UserError, match=message):
        read_settings(_config(**changes))


@pytest.mark.parametrize("name, frames", [("longlive", 12), ("self_forcing", 21)])
def test_the_published_settings(name, frames):
    config = read_config(f"configs/wan1_3b/causal.py:{name}").lock()
    settings = read_settings(config)
    model = settings.kind.model(settings)
    cfg, plan = model.cfg, settings.plan
    assert (cfg.chunk, cfg.sink + (cfg.ring_chunks + 1) * cfg.chunk) == (3, frames)
    np.testing.assert_allclose(plan.sigmas[0], [1.0, 0.9375, 0.83333, 0.625], atol=1e-4)
    shapes = jax.eval_shape(lambda k: model.init(k, (3, 4, 4, 16)), jax.random.key(0))
    assert sum(x.size for x in jax.tree.leaves(shapes)) == 1_418_996_800
