"""The command in a job: converted weights start a student, a trained student goes to PyTorch and back."""

import functools
import shutil

import jax
import numpy as np
import pytest

from greedy_distill_jax import convert
from greedy_distill_jax.errors import UserError
from greedy_distill_jax.runs.run import Run
from greedy_distill_jax.testing import tiny
from greedy_distill_jax.train import train
from greedy_distill_jax.weights.open import open_source
from greedy_distill_jax.weights.verify import compare
from tests.conftest import exit_code

run = functools.partial(exit_code, convert.main)


def test_a_job_with_converted_weights(tiny_teacher, tmp_path, capsys):
    assert run("export", tiny_teacher, tmp_path / "wan", "--format", "original", "--dtype", "bfloat16") == 0
    assert "predicts x0" in capsys.readouterr().err
    assert (tmp_path / "wan" / "codec.npz").read_bytes() == (tiny_teacher / "codec.npz").read_bytes()
    assert run("import", tmp_path / "wan", tmp_path / "converted") == 0
    assert Run.load(tmp_path / "converted").codec.latent_shape(16, 16) == Run.load(tiny_teacher).latent_shape[1:]
    shutil.copytree(tmp_path / "wan", tmp_path / "bare", ignore=shutil.ignore_patterns("codec.npz"))
    assert run("import", tmp_path / "bare", tmp_path / "without") == 0
    with pytest.raises(UserError, match="teacher_from.* such as its codec.npz"):
        Run.load(tmp_path / "without")

    config = tiny.train_config("teacher_forcing", teacher_from=str(tmp_path / "converted"), steps=1)
    state = train(config, tmp_path / "student", show_progress=False)
    assert {leaf.dtype for leaf in jax.tree.leaves(state.nets["student"].params)} == {np.dtype(np.float32)}

    assert run("export", tmp_path / "student", tmp_path / "torch", "--format", "torch-student") == 0
    assert {p.name for p in (tmp_path / "torch").iterdir()} == {
        "codec.npz",
        "config.json",
        "model.safetensors",
        "torch_student.py",
    }
    assert run("import", tmp_path / "torch", tmp_path / "back") == 0
    assert compare(open_source(tmp_path / "back"), open_source(tmp_path / "student")) == []
    trained, back = Run.load(tmp_path / "student"), Run.load(tmp_path / "back")
    assert back.model.cfg == trained.model.cfg and back.latent_shape == trained.latent_shape
    assert back.streamer().plan == trained.streamer().plan
    videos = [r.sample_videos(["a red square moving left"], frames=2) for r in (trained, back)]
    np.testing.assert_array_equal(*videos)

    assert run("export", tmp_path / "student", tmp_path / "raw", "--format", "torch-student", "--part", "params") == 0
    assert not compare(open_source(tmp_path / "raw"), open_source(tmp_path / "student", part="params"))
    assert run("inspect", tmp_path / "student", "--part", "generator") == 2
    assert "--part: 'generator' is no part of" in capsys.readouterr().err
    assert run("export", tmp_path / "student", tmp_path, "--format", "torch-student", "--overwrite") == 2
    assert "which it is made of" in capsys.readouterr().err and (tmp_path / "student" / "checkpoints").is_dir()
    assert run("export", tmp_path / "student", tmp_path / "no", "--format", "original") == 2
    assert "torch-student" in capsys.readouterr().err
    assert run("import", tiny_teacher, tmp_path / "no") == 2
    assert "in our format already" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "student" / "checkpoints")
    assert run("export", tmp_path / "student", tmp_path / "no", "--format", "torch-student") == 2
    assert not (tmp_path / "no").exists()
