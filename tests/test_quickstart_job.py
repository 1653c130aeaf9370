"""What the quickstart does in which folder, with nothing trained."""

import json
from pathlib import Path

import pytest

from greedy_distill_jax import quickstart
from greedy_distill_jax.errors import UserError

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("controls", [False, True])
def test_controls_are_added_to_a_finished_job(tmp_path, monkeypatch, controls):
    done = []
    monkeypatch.setattr(quickstart, "train", lambda config, workdir: done.append(workdir.name))
    monkeypatch.setattr(quickstart, "control_config", lambda config, *runs: config)
    monkeypatch.setattr(quickstart.sample, "main", lambda argv: done.append(argv[1].rpartition("/")[-1]))

    def evaluate(teacher, student, output, *, more, videos, commands):
        output.mkdir(exist_ok=True)
        (output / "metrics.json").write_text(json.dumps({"rows": [{"name": name} for name in more]}))
        (output / "report.html").touch()
        done.append(commands)

    monkeypatch.setattr(quickstart, "evaluate", evaluate)
    monkeypatch.setattr(quickstart, "print_table", lambda metrics: None)
    quickstart.quickstart(tmp_path, speed="smoke")
    command = f"bash launch/quickstart.sh --workdir {tmp_path} --smoke"
    assert done == ["teacher", "student", "stage2", "stage3", "stage3", [command]]
    done.clear()
    quickstart.quickstart(tmp_path, speed="smoke", controls=controls)
    trained = ["teacher", "student", "stage2", "stage3", "stage2_fake_self", "stage1_control"]
    assert done == ([*trained, "stage3", [command + " --controls"]] if controls else [])


@pytest.mark.parametrize("held", [None, b"\xff"])
def test_a_job_that_cannot_be_read_is_another(tmp_path, held):
    (tmp_path / "job").mkdir() if held is None else (tmp_path / "job").write_bytes(held)
    with pytest.raises(UserError, match="holds another job") as error:
        quickstart.quickstart(tmp_path, speed="smoke")
    assert error.value.field == "workdir"


def test_fast_is_a_third_of_the_updates(capsys):
    with pytest.raises(SystemExit):
        quickstart.main(["--help"])
    assert "a third of the updates" in capsys.readouterr().out
    assert "`--fast` makes a third of the updates" in " ".join((ROOT / "README.md").read_text("utf-8").split())
    full, fast = (quickstart.stage_configs(speed, None, Path("x")) for speed in ("full", "fast"))
    assert all(abs(fast[name].steps / full[name].steps - 1 / 3) < 0.02 for name in full)


def test_clips_have_no_controls(tmp_path):
    with pytest.raises(UserError, match="the controls are stage 2's") as error:
        quickstart.quickstart(tmp_path / "new", clips=tmp_path, captions=tmp_path / "c.csv", controls=True)
    assert error.value.field == "controls" and not (tmp_path / "new").exists()
