"""Adapters: base weights and adapter together are the weights of the run, under names that PyTorch's models have."""

import functools
import json
import re

import pytest

from greedy_distill_jax import convert
from greedy_distill_jax.testing import tiny
from greedy_distill_jax.train import train
from tests.conftest import exit_code

torch = pytest.importorskip("torch", reason="needs PyTorch: pip install 'greedy_distill_jax[parity]'")

run = functools.partial(exit_code, convert.main)


@pytest.fixture(scope="module")
def lora_student(made_once, tiny_student):
    config = tiny.train_config("teacher_forcing", steps=2, student_from=str(tiny_student), optimizer__lora__rank=3)
    return made_once("lora_student", lambda folder: train(config, folder, show_progress=False))


def load(folder):
    from safetensors.torch import load_file

    (file,) = folder.glob("*.safetensors")
    return load_file(file)


def add_peft(state, folder):
    """The tensors with the adapter merged in as PEFT does, and the modules that have one."""
    config = json.loads((folder / "adapter_config.json").read_text())
    adapter, modules = load(folder), set()
    for name in [name for name in adapter if name.endswith(".lora_A.weight")]:
        module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        a, b = adapter.pop(name), adapter.pop(name.replace("lora_A", "lora_B"))
        assert a.shape[0] == b.shape[1] == config["r"] and b.abs().max() > 0
        state[f"{module}.weight"] += config["lora_alpha"] / config["r"] * b @ a
        modules.add(module)
    assert not adapter and (config["peft_type"], config["bias"]) == ("LORA", "none")
    linears = {name.removesuffix(".weight") for name in state if name.endswith(".weight")}
    targets = tuple(f".{target}" for target in config["target_modules"])  # PEFT compares ends of names
    assert modules == {name for name in linears if name.endswith(targets)}
    return state, modules


def assert_same(found, wanted):
    assert found.keys() == wanted.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, wanted[name], atol=1e-6, rtol=0, msg=name)


def test_a_teacher_for_peft_and_for_diffusers(tiny_teacher, lora_teacher, tmp_path, capsys):
    diffusers = pytest.importorskip("diffusers", reason="needs diffusers: pip install 'greedy_distill_jax[parity]'")
    for form, adapter in (("original", "peft"), ("diffusers", "diffusers-lora")):
        assert run("export", tiny_teacher, tmp_path / f"{form}-base", "--format", form) == 0
        assert run("export", lora_teacher, tmp_path / form, "--format", form, "--part", "params") == 0
        capsys.readouterr()
        assert run("export", lora_teacher, tmp_path / adapter, "--format", adapter) == 0
        assert capsys.readouterr().err == (
            "note: the adapter is of the last update, as --part params is; it is not averaged.\n"
        )
    merged, modules = add_peft(load(tmp_path / "original-base"), tmp_path / "peft")
    assert_same(merged, load(tmp_path / "original"))
    assert modules == {f"blocks.{i}.{name}" for i in range(2) for name in ("self_attn.q", "cross_attn.q", "ffn.0")}

    model = diffusers.WanTransformer3DModel.from_pretrained(tmp_path / "diffusers-base")
    read = diffusers.loaders.lora_pipeline.WanLoraLoaderMixin.lora_state_dict(tmp_path / "diffusers-lora")
    assert read.keys() == load(tmp_path / "diffusers-lora").keys()  # its own names: nothing is converted
    with torch.no_grad():
        for name in [name for name in read if name.endswith(".lora_A.weight")]:
            module = model.get_submodule(name.removeprefix("transformer.").removesuffix(".lora_A.weight"))
            assert isinstance(module, torch.nn.Linear)
            module.weight += read.pop(name.replace("lora_A", "lora_B")) @ read.pop(name)
    assert not read
    assert_same(model.state_dict(), load(tmp_path / "diffusers"))

    for form, adapter in (("original", "peft"), ("diffusers", "diffusers-lora")):  # and our own reader, either base
        base = {"original": "diffusers", "diffusers": "original"}[form]
        for number, name in enumerate((form, base)):
            merged = tmp_path / f"{adapter}-{number}"
            assert run("import", tmp_path / f"{name}-base", merged, "--lora", tmp_path / adapter) == 0
            assert "6 of 6 modules merged" in capsys.readouterr().out
            assert run("export", merged, tmp_path / f"{adapter}-{number}-out", "--format", form) == 0
            assert_same(load(tmp_path / f"{adapter}-{number}-out"), load(tmp_path / form))


def test_a_student_for_peft(tiny_student, lora_student, tmp_path, capsys):
    for source, name in ((tiny_student, "base"), (lora_student, "trained")):
        part = [] if name == "base" else ["--part", "params"]
        assert run("export", source, tmp_path / name, "--format", "torch-student", *part) == 0
    assert run("export", lora_student, tmp_path / "peft", "--format", "peft") == 0
    merged, modules = add_peft(load(tmp_path / "base"), tmp_path / "peft")
    assert_same(merged, load(tmp_path / "trained"))
    assert {"etm.blocks.0.self_attn.q", "sdd.blocks.1.ffn.2"} < modules and "sdd.blocks.0.self_attn.z_k" not in modules

    assert run("export", lora_student, tmp_path / "half", "--format", "peft", "--dtype", "bfloat16") == 0
    half, whole = load(tmp_path / "half"), load(tmp_path / "peft")
    assert all(torch.equal(half[name], tensor.bfloat16()) for name, tensor in whole.items())
    capsys.readouterr()
    for source, options, said in (
        (lora_student, ["diffusers-lora"], "--format: .* holds ETM . SDD, which diffusers does not know; use peft."),
        (lora_student, ["peft", "--part", "ema"], "--part: an adapter is not averaged, so peft has no part ema"),
        (tiny_student, ["peft"], "SRC: .* was not trained with LoRA, so there is no adapter; name a run with"),
        (tmp_path / "trained", ["peft"], "SRC: .* was not trained with LoRA"),
    ):
        assert run("export", source, tmp_path / "no", "--format", *options) == 2
        error = capsys.readouterr().err
        assert re.search(said, error), error
        assert not (tmp_path / "no").exists()
