"""Stage 3 in two processes: each judges its own streams on the host, and both make the same student."""

import subprocess
import sys

import jax
import numpy as np
import pytest

from greedy_distill_jax.cli.config_flags import read_config
from greedy_distill_jax.runs.run import Run
from greedy_distill_jax.train import train
from greedy_distill_jax.training.metrics import read_scalars
from tests.training.test_two_processes import joined

REWARD = """
import jax, numpy as np
from greedy_distill_jax import rewards

@rewards.reward(kind="host")
def shade(view):
    assert len(view.video_BTHWC) == len(view.captions) == 8 // jax.process_count() * 2
    wanted = np.asarray([len(caption) for caption in view.captions], np.float32)  # of its own caption
    return wanted * view.video_BTHWC.astype(np.float32).mean((1, 2, 3, 4))
"""
CONFIG = """
import os
from greedy_distill_jax.testing.tiny import train_config
def get_config(mesh="4,1"):
    data, context = map(int, mesh.split(","))
    config = train_config(
        "rl", steps=1, student_from=os.environ["STUDENT"], text_dropout=0.0, data__batch=8, mesh__data=data,
        mesh__context=context, sample__sampler="renoise", rl__group=2, rl__frames=8, rl__clip=4, optimizer__warmup=0)
    with config.unlocked():
        del config.losses["flow_matching"]
        config.losses.grpo = dict(loss="cm_grpo", weight=1.0, options={})
        config.rl.step = "stochastic"
        config.rl.rewards.shade = dict(reward=os.environ["REWARD"] + ":shade", weight=1.0)
    return config
"""


@pytest.mark.slow
@pytest.mark.subprocesses
def test_two_processes_judge_and_learn_as_one(tmp_path, tiny_student, subprocess_env, monkeypatch):
    (tmp_path / "reward.py").write_text(REWARD)
    (tmp_path / "config.py").write_text(CONFIG)
    sources = {"STUDENT": str(tiny_student), "REWARD": str(tmp_path / "reward.py")}
    command = [sys.executable, "-m", "greedy_distill_jax.train", f"--config={tmp_path / 'config.py'}"]
    command.append(f"--workdir={tmp_path / 'two'}")
    env = joined(subprocess_env) | sources
    running = [
        subprocess.Popen(command, env=env | {"JAX_PROCESS_ID": str(i)}, stderr=subprocess.PIPE, text=True)
        for i in (0, 1)
    ]
    said = [process.communicate(timeout=900)[1] for process in running]
    assert [process.returncode for process in running] == [0, 0], "\n".join(said)
    for name, value in sources.items():
        monkeypatch.setenv(name, value)
    train(read_config(f"{tmp_path / 'config.py'}:4,2"), tmp_path / "one", show_progress=False)
    one, two = (jax.device_get(Run.load(tmp_path / name).params) for name in ("one", "two"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), one, two)
    for a, b in zip(read_scalars(tmp_path / "one"), read_scalars(tmp_path / "two"), strict=True):
        assert a["rl/reward/shade/max"] == pytest.approx(b["rl/reward/shade/max"], rel=1e-3)
