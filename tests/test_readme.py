"""The README's code runs as written (with a shorter run behind ``train``)."""

import pathlib
import re

from greedy_distill_jax import train as module
from greedy_distill_jax.logging import read_scalars

README = (pathlib.Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


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
