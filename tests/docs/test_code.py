"""The code in README.md and docs/ runs as written: every python block, every option of every command."""

import contextlib
import importlib
import io
import re
import shlex
import sys

import pytest

from greedy_distill_jax import convert, losses, rewards, train as training
from greedy_distill_jax.cli.config_flags import load_config
from greedy_distill_jax.config import open_keys, stages
from greedy_distill_jax.ops.attention import backends
from greedy_distill_jax.testing import tiny
from greedy_distill_jax.training.metrics import read_scalars
from tests.conftest import exit_code
from tests.docs.documents import blocks
from tests.training.start import begin


@pytest.fixture(autouse=True)
def registries(monkeypatch):
    """What a block registers is gone afterwards."""
    monkeypatch.setattr(losses, "_LOSSES", dict(losses._LOSSES))
    monkeypatch.setattr(rewards, "_REWARDS", dict(rewards._REWARDS))
    monkeypatch.setattr(backends, "BACKENDS", backends.BACKENDS)
    monkeypatch.setattr(stages, "_STAGES", dict(stages._STAGES))


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    """A run directory of a student, before an update: text and latents of the quickstart's sizes, narrow networks."""
    workdir = tmp_path_factory.mktemp("docs") / "student"
    config = tiny.train_config("teacher_forcing", data__frames=8)
    config.model.text_dim, config.model.text_len = None, None
    begin(config, workdir)
    return workdir


def _in_an_empty_folder(block, tmp_path, monkeypatch, request):
    monkeypatch.chdir(tmp_path)
    return {}


def _one_update(block, tmp_path, monkeypatch, request):
    monkeypatch.chdir(tmp_path)
    original = training.train

    def short(config, workdir):
        config.steps, config.log.samples_every, config.compile_cache, config.data.batch = 1, 0, "", 8
        config.model.dim, config.model.ffn_dim, config.model.num_layers = 24, 32, 1
        return original(config, workdir, show_progress=False)

    monkeypatch.setattr(training, "train", short)
    return {}


def _a_student(block, tmp_path, monkeypatch, request):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "quickstart").mkdir(parents=True)
    for name in ("student", "stage2"):
        (tmp_path / "runs" / "quickstart" / name).symlink_to(request.getfixturevalue("student"))
    return {}


def _an_exported_student(block, tmp_path, monkeypatch, request):
    pytest.importorskip("torch", reason="needs PyTorch: pip install 'greedy_distill_jax[parity]'")
    folder = tmp_path / "exported"
    assert (
        exit_code(convert.main, "export", request.getfixturevalue("student"), folder, "--format", "torch-student") == 0
    )
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, "torch_student", raising=False)
    return {}


SETUPS = {
    "": _in_an_empty_folder,
    "one update of a tiny network": _one_update,
    "a student of the smoke size": _a_student,
    "the folder of an exported student of the smoke size": _an_exported_student,
}


# What stands on two pages runs once.
@pytest.mark.parametrize("block", list({block.code: block for block in blocks("python")}.values()), ids=str)
def test_python(block, tmp_path, monkeypatch, request):
    assert block.setup in SETUPS, f"choose from {list(SETUPS)}"
    names = SETUPS[block.setup](block, tmp_path, monkeypatch, request)
    exec(compile("\n" * (block.line - 1) + block.code, block.page, "exec"), names)
    if "losses.register" in block.code and (tmp_path / "runs" / "mine").exists():
        assert read_scalars(tmp_path / "runs" / "mine")[0]["teacher/smooth"] > 0


def commands():
    """(module, words) of every `python -m greedy_distill_jax...` in the documents."""
    for block in blocks("bash"):
        for line in block.code.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words[:2] == ["python", "-m"] and words[2].startswith("greedy_distill_jax."):
                yield pytest.param(words[2], words[3:], id=f"{block}-{words[2].rsplit('.')[-1]}")


@pytest.mark.parametrize(("module", "words"), list(commands()))
def test_commands_have_the_options_and_keys_that_documents_use(module, words):
    has_subcommands = not words[0].startswith("-")
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), pytest.raises(SystemExit):
        importlib.import_module(module).main([*words[:has_subcommands], "--help"])
    options = [word.split("=")[0] for word in words if word.startswith("--")]
    options = [option for option in options if not option.startswith("--config.")]
    assert not [option for option in options if not re.search(rf"{option}\b", shown.getvalue())]
    keys = [word for word in words if word.startswith("--config.") or word.startswith("--config=")]
    if keys:
        load_config(keys, {}, open_keys=open_keys())  # UserError for a key that does not exist
