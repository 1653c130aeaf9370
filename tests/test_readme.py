"""The README's code runs as written (with a shorter run behind ``train``)."""

import pathlib
import re

from greedy_distill_jax import train as module
from greedy_distill_jax.training.metrics import read_scalars

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_swapping_a_loss(tmp_path, monkeypatch):
    block = next(b for b in re.findall(r"```python\n(.*?)```", README, re.S) if "losses.register" in b)
    original = module.train

    def short(config, workdir):
        config.steps, config.log.samples_every, config.compile_cache, config.data.batch = 1, 0, "", 8
        config.model.dim, config.model.ffn_dim, config.model.num_layers = 24, 32, 1
        return original(config, tmp_path / workdir, show_progress=False)

    monkeypatch.setattr(module, "train", short)
    exec(compile(block, "README.md", "exec"), {})
    assert read_scalars(tmp_path / "runs" / "mine")[0]["teacher/smooth"] > 0


def test_attention():
    block = next(b for b in re.findall(r"```python\n(.*?)```", README, re.S) if "decode_attention" in b)
    names = {}
    exec(compile(block, "README.md", "exec"), names)
    assert names["out"].shape == (1, 64, 4, 64)


def test_files_named_in_prose_are_there():
    named = set(re.findall(r"`((?:[\w*.-]+/)*[\w*.-]+\.(?:py|sh|ipynb)|[\w*.-]+/[\w*./-]+\.(?:json|md|png))`", README))
    assert {"greedy_distill_jax/distribution/sharding.py", "tests/streaming/test_stream.py"} <= named
    missing = {name for name in named if not list(ROOT.glob(name))}
    assert missing == {"torch_student.py"}  # lies in an exported folder


def test_prose_has_at_most_120_columns():
    lines = [line for line in README.splitlines() if not line.startswith("|")]  # rows of tables cannot be wrapped
    assert not [line for line in lines if len(line) > 120]
