"""Every layout of the table of docs/weights.md, as a generated file: what it is called, or what it is refused as."""

import functools
import json
import re
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from greedy_distill_jax import convert
from greedy_distill_jax.models.students.etm_sdd import Student
from greedy_distill_jax.testing import tiny
from greedy_distill_jax.weights.open import open_source
from greedy_distill_jax.weights.source import TreeSource
from greedy_distill_jax.weights.verify import compare
from greedy_distill_jax.weights.write import write
from tests.conftest import exit_code
from tests.weights.test_lora import named
from tests.weights.test_precisions import quantised
from tests.weights.test_source import tensors

run = functools.partial(exit_code, convert.main)

SIZES = dict(num_heads=2, text_len=3)
WAN = "Wan DiT (3 layers"
CAUSAL = r"a causal student \(3 layers"


def folder(path, state, config=None, name="diffusion_pytorch_model.safetensors"):
    """A folder with one file, and with a config.json."""
    path.mkdir(parents=True)
    save_file(state, path / name)
    (path / "config.json").write_text(json.dumps(SIZES | (config or {})))
    return path


def diffusers(path, **config):
    sizes = dict(num_attention_heads=2, attention_head_dim=12, num_layers=3, eps=1e-6)
    return folder(path, tensors("diffusers"), sizes | config)


def shards(path):
    path.mkdir()
    items = list(tensors().items())
    for number, part in enumerate((items[:50], items[50:]), 1):
        save_file(dict(part), path / f"diffusion_pytorch_model-0000{number}-of-00002.safetensors")
    index = {n: f"diffusion_pytorch_model-0000{1 + (i >= 50)}-of-00002.safetensors" for i, (n, _) in enumerate(items)}
    (path / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (path / "config.json").write_text(json.dumps(SIZES))
    return path


def wrapped(prefix, state=None, more=None):
    found = {prefix + name: x for name, x in (tensors() if state is None else state).items()}
    return lambda path: folder(path, found | (more or {}))


def pt(make, config=None):
    """A `.pt` of what ``make`` makes of a state dict of tensors, with a config.json beside it."""

    def write_pt(path):
        torch = pytest.importorskip("torch", reason="needs PyTorch: pip install 'greedy_distill_jax[parity]'")
        path.mkdir()
        torch.save(make({name: torch.from_numpy(x.copy()) for name, x in tensors().items()}), path / "x.pt")
        (path / "config.json").write_text(json.dumps(SIZES | (config or {})))
        return path / "x.pt"

    return write_pt


def model(state):
    return {f"model.{name}": x for name, x in state.items()}


def fsdp(state):
    return {
        f"model._fsdp_wrapped_module.{n.replace('.ffn', '._checkpoint_wrapped_module.ffn')}": x
        for n, x in state.items()
    }


def extra(name, *shape):
    return lambda path: folder(path, {**tensors(), name: np.ones(shape or (2,), np.float32)})


def channels(takes, makes):
    state = tensors()
    patch, head = state["patch_embedding.weight"], state["head.head.weight"]
    state["patch_embedding.weight"] = np.ones((len(patch), takes, *patch.shape[2:]), np.float32)
    state["head.head.weight"] = np.ones((4 * makes, head.shape[1]), np.float32)
    state["head.head.bias"] = np.ones(4 * makes, np.float32)
    return lambda path: folder(path, state)


def alone(name, content):
    def write_file(path):
        path.mkdir()
        (path / name).write_bytes(content)
        return path / name

    return write_file


def several(*names):
    def write_folders(path):
        for name in names:
            folder(path / name, tensors())
        return path

    return write_folders


def expert(path):
    save_file(tensors(), path.with_name("wan2.2_t2v_high_noise_14B.safetensors"))
    return path.with_name("wan2.2_t2v_high_noise_14B.safetensors")


def dcp(path):
    path.mkdir()
    (path / ".metadata").write_bytes(b"\x80\x02.")
    (path / "__0_0.distcp").write_bytes(b"")
    return path


def student(path):
    cfg = tiny.student_config()
    write(TreeSource(cfg, tiny.random_params(Student(cfg))), path, "torch-student")
    return path


def lora(name="lora.safetensors", **form):
    """A folder with LoRA weights, whose name an adapter's own reader would look for."""

    def write_lora(path):
        path.mkdir()
        save_file(named(**form), path / name)
        return path if name != "lora.safetensors" else path / name

    return write_lora


def longlive_lora(path):
    torch = pytest.importorskip("torch", reason="needs PyTorch: pip install 'greedy_distill_jax[parity]'")
    state = {n: torch.from_numpy(x) for n, x in named("lora_A", "lora_B", "base_model.model.").items()}
    torch.save({"generator_lora": state, "critic_lora": state, "step": 1}, path.with_suffix(".pt"))
    return path.with_suffix(".pt")


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 2838276600\n"
VAE = {"vae.decoder.conv1.weight": np.ones(2, np.float32)}

# First column of the table -> (what makes it, options of inspect, what is said of it).
READ = {
    "Wan's own": (wrapped(""), [], f"format        original\n.*{re.escape(WAN)}"),
    "Wan's own in shards": (shards, [], f"format        original\n.*{re.escape(WAN)}"),
    "diffusers transformer": (diffusers, ["--text-len", "3"], f"format        diffusers\n.*{re.escape(WAN)}"),
    "diffusers pipeline": (
        lambda path: diffusers(path / "transformer").parent,
        ["--text-len", "3"],
        f"format        diffusers\n.*{re.escape(WAN)}",
    ),
    "ComfyUI": (wrapped("model.diffusion_model."), [], "names behind model.diffusion_model.\n"),
    "ComfyUI all in one": (
        wrapped("model.diffusion_model.", more=VAE),
        [],
        r"besides       vae \(1 tensors\), not read",
    ),
    "ComfyUI scaled FP8": (
        lambda path: wrapped("", quantised(scale="scale_weight")[0])(path),
        [],
        "precision     30 tensors of float8_e4m3fn times their scale_weight, float32",
    ),
    "lightx2v FP8": (
        lambda path: wrapped("", quantised(scale="weight_scale", rows=True)[0])(path),
        [],
        "precision     30 tensors of float8_e4m3fn times their weight_scale, float32",
    ),
    "FP8 cast": (
        lambda path: wrapped("", {n: x.astype(ml_dtypes.float8_e5m2) for n, x in tensors().items()})(path),
        [],
        "precision     96 tensors of float8_e5m2 without a scale, bfloat16",
    ),
    "Self-Forcing": (
        pt(lambda s: {"generator": model(s), "critic": model(s), "generator_ema": fsdp(s), "step": 600}),
        [],
        r"part generator_ema, names behind model.\nparts         generator \(96\), critic \(96\), generator_ema \(96\)"
        f".*{CAUSAL}.*kind          causal student",
    ),
    "CausVid": (pt(lambda s: {"generator": model(s)}), [], f"part generator, names behind model.\n.*{CAUSAL}"),
    "LongLive": (
        pt(lambda s: {"generator": model(s), "critic": model(s)}),
        ["--window", "12", "--sink", "3"],
        f"{CAUSAL}.*window 12, sink 3",
    ),
    "critic": (
        pt(lambda s: {"generator": model(s), "critic": model(s)}),
        ["--part", "critic"],
        f"part critic, .*{re.escape(WAN)}.*kind          teacher",
    ),
    "causal folder": (
        lambda path: folder(path, tensors(), dict(_class_name="CausalWanModel", local_attn_size=6, sink_size=3)),
        [],
        f"{CAUSAL}.*window 6, sink 3",
    ),
    "trainer's checkpoint": (
        pt(lambda s: {"module": {f"module.{n}": x for n, x in s.items()}, "optimizer": {"m": s["head.head.bias"]}}),
        [],
        "part module, names behind module.\n",
    ),
    "exported student": (student, [], r"format        torch-student\n.*a student \(ETM 2 \+ SDD 3 layers"),
    "LoRA of PEFT": (
        lora("adapter_model.safetensors", a="lora_A", b="lora_B", prefix="base_model.model."),
        [],
        r"LoRA weights\n.*rank          2 \(5 modules\)",
    ),
    "LoRA of diffusers": (
        lora("pytorch_lora_weights.safetensors", a="lora_A", b="lora_B", prefix="transformer.", diffusers=True),
        [],
        r"LoRA weights\n.*rank          2 \(5 modules\)",
    ),
    "LoRA of kohya's programs": (
        lora(a="lora_down", b="lora_up", prefix="lora_unet_", kohya=True, alpha=1),
        [],
        r"alpha         1 \(5 modules\)",
    ),
    "LoRA of lightx2v": (
        lora(a="lora_down", b="lora_up", prefix="diffusion_model.", alpha=8),
        [],
        r"alpha         8 \(5 modules\)",
    ),
    "LoRA of LongLive": (longlive_lora, [], r"LoRA weights, part generator_lora\n.*alpha         not said"),
}
REFUSED = {
    "GGUF": (alone("wan.gguf", b"GGUF\x03\x00\x00\x00"), [], "is a GGUF file, whose quantised weights are not read"),
    "Git LFS pointer": (alone("x.safetensors", LFS), [], "pointer of Git LFS to 2,838,276,600 bytes, .*git lfs pull"),
    "DCP folder": (dcp, [], r"torch.distributed \(DCP\).*format_utils dcp_to_torch .* model.pt"),
    "int8": (
        lambda path: wrapped("", tensors() | {"blocks.0.ffn.0.weight": np.ones((32, 24), np.int8)})(path),
        [],
        "blocks.0.ffn.0.weight has dtype int8; use weights of floating point",
    ),
    "image-to-video": (extra("blocks.0.cross_attn.k_img.weight"), [], "holds image-to-video weights"),
    "image-to-video of Wan2.2, Fun": (channels(36, 16), [], "takes 36 channels and makes 16, as image-to-video"),
    "VACE": (extra("vace_blocks.0.before_proj.weight"), [], "holds VACE weights"),
    "control": (extra("control_adapter.conv.weight"), [], "holds camera control or Fun control weights"),
    "speech-to-video": (extra("casual_audio_encoder.encoder.final_linear.weight"), [], "holds speech-to-video"),
    "Animate": (extra("face_adapter.fuser_blocks.0.k_norm.weight"), [], "holds Wan2.2 Animate weights"),
    "SkyReels-V2": (extra("fps_embedding.weight"), [], "holds SkyReels-V2"),
    "Wan2.2 in two experts": (several("high_noise_model", "low_noise_model"), [], "holds the two experts"),
    "Wan2.2 of diffusers": (several("transformer", "transformer_2"), [], "holds the two experts of a Wan2.2 model"),
    "one expert": (expert, [], r"is, by its name wan2.2_t2v_high_noise_14B.safetensors \(.*, one of two experts"),
    "Wan2.2 TI2V-5B": (channels(48, 48), [], r"holds Wan2.2 TI2V-5B weights \(48 latent channels"),
    "video autoencoder": (
        lambda path: folder(path, {"decoder.middle.0.residual.0.gamma": np.ones(2, np.float32)}),
        [],
        "are those of a video autoencoder; name it as a codec",
    ),
    "text encoder": (
        lambda path: folder(path, {"token_embedding.weight": np.ones(2, np.float32)}),
        [],
        "are those of a text encoder; name it as one",
    ),
}


@pytest.mark.parametrize("layout", READ)
def test_what_is_read(layout, tmp_path, capsys):
    make, options, said = READ[layout]
    assert run("inspect", make(tmp_path / "x"), *options) == 0, capsys.readouterr()
    assert re.search(said, (out := capsys.readouterr().out), re.DOTALL), out


@pytest.mark.parametrize("layout", REFUSED)
@pytest.mark.parametrize("command", ["inspect", "import"])
def test_what_is_named_and_refused(layout, command, tmp_path, capsys):
    make, options, said = REFUSED[layout]
    path = make(tmp_path / "x")
    assert run(command, path, *([tmp_path / "no"] if command == "import" else []), *options) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: SRC: ") and error.count("\n") == 1 and re.search(said, error), error
    assert not (tmp_path / "no").exists()


def test_one_of_two_transformers_is_no_model(tmp_path, capsys):
    several("transformer", "transformer_2")(tmp_path / "x")
    assert run("inspect", tmp_path / "x" / "transformer") == 2
    assert "holds the two experts" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["x.safetensors", "x.safetensors.index.json"])
def test_a_file_of_one_of_two_transformers_is_no_model(name, tmp_path, capsys):
    pipeline = several("transformer", "transformer_2")(tmp_path / "x")
    save_file(tensors(), pipeline / "transformer_2" / "x.safetensors")
    weight_map = json.dumps({"weight_map": dict.fromkeys(tensors(), "x.safetensors")})
    (pipeline / "transformer_2" / "x.safetensors.index.json").write_text(weight_map)
    assert run("inspect", pipeline / "transformer_2" / name) == 2
    assert f"{pipeline} holds the two experts" in capsys.readouterr().err
    save_file(tensors(), pipeline / "other.safetensors")  # beside them: no part of them
    assert run("inspect", pipeline / "other.safetensors", "--heads", "2", "--text-len", "3") == 0


def test_one_expert_in_a_cache_of_links(tmp_path, capsys):
    (tmp_path / "blobs").mkdir()
    save_file(tensors(), tmp_path / "blobs" / "0123abcd")
    (tmp_path / "wan2.2_low_noise.safetensors").symlink_to(tmp_path / "blobs" / "0123abcd")
    assert run("inspect", tmp_path / "wan2.2_low_noise.safetensors", "--heads", "2", "--text-len", "3") == 2
    assert "is, by its name wan2.2_low_noise.safetensors (" in capsys.readouterr().err


def test_the_line_for_dcp_makes_a_file_that_is_read(tmp_path, capsys):
    torch = pytest.importorskip("torch", reason="needs PyTorch: pip install 'greedy_distill_jax[parity]'")
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint import format_utils

    state = {name: torch.from_numpy(x.copy()) for name, x in tensors().items()}
    checkpoint.save({"app": {"model": state}}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    assert run("inspect", tmp_path / "dcp") == 2
    assert "format_utils dcp_to_torch" in capsys.readouterr().err
    format_utils.dcp_to_torch_save(tmp_path / "dcp", tmp_path / "model.pt")
    source = open_source(tmp_path / "model.pt", heads=2, text_len=3)
    assert source.meta["part"] == "app.model"
    save_file(tensors(), tmp_path / "same.safetensors")
    assert compare(source, open_source(tmp_path / "same.safetensors", heads=2, text_len=3)) == []


def test_the_table_has_the_layouts_that_are_tested():
    text = (Path(__file__).resolve().parents[2] / "docs" / "weights.md").read_text(encoding="utf-8")
    table = text.split("## Layouts in circulation\n")[1].split("\n## ")[0]
    rows = [line.split("|")[1].strip() for line in table.splitlines() if line.startswith("| ")][1:]
    assert rows == [*READ, *REFUSED]
