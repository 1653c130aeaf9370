"""Prefixes and containers: whatever wraps a model is found and named, and what else there is, is listed."""

import functools

import numpy as np
import pytest
from safetensors.numpy import save_file

from greedy_distill_jax import convert
from greedy_distill_jax.weights.open import open_source
from greedy_distill_jax.weights.verify import compare
from tests.conftest import exit_code
from tests.weights.test_source import SIZES, tensors

run = functools.partial(exit_code, convert.main)
VAE = {"vae.decoder.conv1.weight": np.zeros((2, 2), np.float32), "vae.decoder.conv1.bias": np.zeros(2, np.float32)}


def opened(path, part=""):
    return open_source(path, part=part, heads=2, text_len=3)


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    path = tmp_path_factory.mktemp("bare") / "bare.safetensors"
    save_file(tensors(), path)
    return path


def behind(prefix, naming="original", seed=0):
    return {prefix + name: value for name, value in tensors(naming, seed=seed).items()}


@pytest.mark.parametrize("naming", ["original", "diffusers"])
@pytest.mark.parametrize(
    "wrapper", ["model.diffusion_model.", "diffusion_model.", "module.", "transformer.", "net.", "ema.shadow.dit."]
)
def test_any_wrapper_is_found_and_named(wrapper, naming, bare, tmp_path, capsys):
    save_file(behind(wrapper, naming), tmp_path / "in.safetensors")
    source = opened(tmp_path / "in.safetensors")
    assert source.meta["wrapper"] == wrapper and compare(source, opened(bare)) == []
    assert run("inspect", tmp_path / "in.safetensors", *SIZES) == 0
    assert f"format        {naming}, names behind {wrapper}\n" in capsys.readouterr().out


def test_what_lies_besides_a_model_is_named(bare, tmp_path, capsys):
    save_file({**behind("model.diffusion_model."), **VAE}, tmp_path / "all.safetensors")
    assert run("import", tmp_path / "all.safetensors", tmp_path / "ours", *SIZES) == 0
    assert "also holds vae (2 tensors), which are no part of the model" in capsys.readouterr().err
    assert compare(opened(bare), open_source(tmp_path / "ours")) == []
    assert run("inspect", tmp_path / "all.safetensors", *SIZES) == 0
    assert "besides       vae (2 tensors), not read" in capsys.readouterr().out
    save_file({**tensors(), **VAE}, tmp_path / "bare.safetensors")  # nothing tells that they are not the model's
    assert run("import", tmp_path / "bare.safetensors", tmp_path / "no", *SIZES) == 2
    assert "unexpected tensor vae.decoder.conv1.bias and 1 more" in capsys.readouterr().err


def test_a_model_without_its_first_tensor_names_that_tensor(tmp_path, capsys):
    state = behind("module.")
    del state["module.patch_embedding.weight"]
    save_file(state, tmp_path / "in.safetensors")
    assert run("inspect", tmp_path / "in.safetensors", *SIZES) == 2
    assert "tensor patch_embedding.weight is missing" in capsys.readouterr().err


def test_several_models_in_one_file(bare, tmp_path, capsys):
    path = tmp_path / "two.safetensors"
    save_file({**behind("generator.model."), **behind("critic.model.", seed=1)}, path)
    assert compare(opened(path), opened(bare)) == []  # the generator comes first
    assert opened(path).meta["part"] == "generator.model"
    assert run("inspect", path, *SIZES) == 0
    assert "\nparts         critic.model, generator.model\n" in capsys.readouterr().out
    assert len(compare(opened(path, "critic"), opened(bare))) == 96
    save_file({**behind("a."), **behind("b.", seed=1)}, path)
    for part, said in (("", "holds several models: a, b; choose one"), ("c", "'c' is not in")):
        assert run("inspect", path, "--part", part, *SIZES) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: --part: ") and said in error and "a, b" in error
    assert compare(opened(path, "a"), opened(bare)) == []


# --- .pt --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (lambda s: {"state_dict": s, "epoch": 3}, "state_dict"),
        (lambda s: {"ema": s, "optimizer": {"lr": 1.0}}, "ema"),
        (lambda s: {"module": s, "optimizer": {"state": {"exp_avg": s["patch_embedding.bias"]}}}, "module"),
        (lambda s: {"app": {"model": s, "step": 7}}, "app.model"),
        (lambda s: {"generator": {f"model.{name}": x for name, x in s.items()}, "state_dict": s}, "generator"),
        (lambda s: {**s, "step": 7, "args": {"lr": 1.0}}, ""),
    ],
)
def test_any_dictionary_of_a_pt(content, part, bare, tmp_path):
    torch = pytest.importorskip("torch", reason="needs PyTorch: pip install 'greedy_distill_jax[parity]'")
    state = {name: torch.from_numpy(x.copy()) for name, x in tensors().items()}
    torch.save(content(state), tmp_path / "in.pt")
    source = opened(tmp_path / "in.pt")
    assert source.meta["part"] == part and compare(source, opened(bare)) == []


def test_several_dictionaries_of_a_pt_are_listed(bare, tmp_path, capsys):
    torch = pytest.importorskip("torch", reason="needs PyTorch: pip install 'greedy_distill_jax[parity]'")
    parts = {
        name: {key: torch.from_numpy(x.copy()) for key, x in tensors(seed=seed).items()}
        for seed, name in enumerate(("online", "target"))
    }
    torch.save({**parts, "step": 7}, tmp_path / "in.pt")
    assert run("inspect", tmp_path / "in.pt", *SIZES) == 2
    assert "--part: " in (error := capsys.readouterr().err) and "online (96), target (96); choose one" in error
    assert run("inspect", tmp_path / "in.pt", *SIZES, "--part", "generator") == 2
    assert "has no part 'generator'; it has online (96), target (96)" in capsys.readouterr().err
    assert compare(opened(tmp_path / "in.pt", "online"), opened(bare)) == []
    assert len(compare(opened(tmp_path / "in.pt", "target"), opened(bare))) == 96


def test_a_tensor_beside_the_dictionaries_is_no_model(tmp_path, capsys):
    torch = pytest.importorskip("torch", reason="needs PyTorch: pip install 'greedy_distill_jax[parity]'")
    state = {name: torch.from_numpy(x.copy()) for name, x in tensors().items()}
    torch.save({"generator_ema": state, "step": torch.tensor(7)}, tmp_path / "in.pt")
    assert run("inspect", tmp_path / "in.pt", *SIZES, "--part", "generatorema") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --part: ") and "has no part 'generatorema'; it has" in error
    assert "generator_ema (96)" in error


def test_an_adapter_is_no_model(tmp_path, capsys):
    factors = {"transformer.blocks.0.attn1.to_q.lora_A.weight": np.zeros((2, 24), np.float32)}
    save_file(factors, tmp_path / "lora.safetensors")
    assert run("import", tmp_path / "lora.safetensors", tmp_path / "no") == 2
    assert "holds LoRA weights, not a model" in capsys.readouterr().err


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_a_shard_by_itself_is_no_model(suffix, tmp_path, capsys):
    file = tmp_path / f"diffusion_pytorch_model-00002-of-00007.{suffix}"
    file.write_bytes(b"x" * 300)
    assert run("inspect", file) == 2
    assert "is one of 7 shards of a model; name their folder or their index" in capsys.readouterr().err
    assert run("inspect", tmp_path) == 2
    assert "holds 1 of 7 shards" in capsys.readouterr().err
