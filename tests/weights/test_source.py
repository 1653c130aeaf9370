"""Round trips bit by bit, formats that are recognised, and bad input in one line."""

import dataclasses
import functools
import json
import pickle
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from greedy_distill_jax import convert
from greedy_distill_jax.errors import UserError
from greedy_distill_jax.models.students.etm_sdd import Student
from greedy_distill_jax.models.wan.dit import Teacher
from greedy_distill_jax.testing import tiny
from greedy_distill_jax.weights.architecture import as_config
from greedy_distill_jax.weights.open import open_source
from greedy_distill_jax.weights.source import TreeSource
from greedy_distill_jax.weights.verify import compare
from greedy_distill_jax.weights.write import tensors_of, write
from tests.conftest import exit_code

run = functools.partial(exit_code, convert.main)

SIZES = ["--heads", "2", "--text-len", "3"]
NAME = "blocks.1.ffn.0.weight"


def tensors(naming="original", dtype="float32", seed=0):
    """{foreign name: array} of a tiny teacher."""
    source = TreeSource(tiny.BASE, tiny.random_params(Teacher(tiny.BASE), seed))
    return dict(tensors_of(source, naming, dtype))


def bits(state):
    return {name: (x.dtype, x.shape, x.tobytes()) for name, x in state.items()}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("naming", ["original", "diffusers"])
def test_safetensors_round_trip(naming, dtype, tmp_path, capsys):
    state = tensors(naming, dtype)
    save_file(state, tmp_path / "in.safetensors")
    assert run("import", tmp_path / "in.safetensors", tmp_path / "ours", *SIZES) == 0
    assert run("export", tmp_path / "ours", tmp_path / "out", "--format", naming) == 0
    back = load_file(tmp_path / "out" / "diffusion_pytorch_model.safetensors")
    assert bits(back) == bits(state)
    assert run("verify", tmp_path / "ours", tmp_path / "out") == 0
    assert f"{len(state)} tensors are identical bit by bit" in capsys.readouterr().out
    assert open_source(tmp_path / "out").cfg == open_source(tmp_path / "ours").cfg  # heads and rows travel along


@pytest.mark.parametrize("wrapped", [False, True], ids=["plain", "wrapped"])
def test_pt_round_trip(wrapped, tmp_path, capsys):
    torch = pytest.importorskip("torch", reason="needs PyTorch: pip install 'greedy_distill_jax[parity]'")

    def state(seed, dtype="float32"):
        found = {f"model.{name}": torch.from_numpy(x.copy()) for name, x in tensors(seed=seed).items()}
        if wrapped:
            found = {
                name.replace("blocks.1.", "_fsdp_wrapped_module.blocks.1._checkpoint_wrapped_module._orig_mod."): x
                for name, x in found.items()
            }
        return {name: x.to(getattr(torch, dtype)) for name, x in found.items()}

    parts = {"generator": state(0, "bfloat16"), "critic": state(1), "generator_ema": state(2)}
    torch.save({**parts, "step": 7}, tmp_path / "in.pt")
    for part, given in [("", parts["generator_ema"]), ("generator", parts["generator"]), ("critic", parts["critic"])]:
        target = tmp_path / f"ours{part}"
        assert run("import", tmp_path / "in.pt", target, "--part", part, *SIZES) == 0
        assert run("export", target, tmp_path / f"out{part}.pt", "--format", "causal-pt") == 0
        back = torch.load(tmp_path / f"out{part}.pt", weights_only=True)[part or "generator_ema"]
        clean = {
            n.replace("_fsdp_wrapped_module.", "").replace("_checkpoint_wrapped_module._orig_mod.", ""): x
            for n, x in given.items()
        }
        assert set(back) == set(clean) and all(back[n].dtype == x.dtype for n, x in clean.items())
        assert all(torch.equal(back[n], x) for n, x in clean.items())
    assert run("verify", tmp_path / "in.pt", tmp_path / "ours", *SIZES) == 0
    assert run("verify", tmp_path / "in.pt", tmp_path / "ourscritic", *SIZES) == 1
    torch.save(dict(state(2)), tmp_path / "bare.pth")
    torch.save({"model": state(2)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    for name in ("bare.pth", "old.pt"):
        assert run("verify", tmp_path / name, tmp_path / "ours", *SIZES) == 0, capsys.readouterr()


@pytest.mark.parametrize("fusion", ["selfkv", "xattn2", "replace", "concat", "selfkv own"])
def test_student_round_trip(fusion, tmp_path):
    fusion, _, own = fusion.partition(" ")
    cfg = tiny.student_config(fusion=fusion, chunk=2, sink=1, gate_init=0.2, context_weights=own or "shared")
    source = TreeSource(cfg, tiny.random_params(Student(cfg)))
    plan = {"sampler": "renoise", "sigmas": [[1.0, 0.5]], "context_sigmas": [0.0], "shift": 1.0}
    write(source, tmp_path / "torch", "torch-student", student={"plan": plan, "latent_shape": [8, 4, 4, 4]})
    assert {p.name for p in (tmp_path / "torch").iterdir()} == {"config.json", "model.safetensors", "torch_student.py"}
    assert run("import", tmp_path / "torch", tmp_path / "ours") == 0
    ours = open_source(tmp_path / "ours")
    assert ours.cfg == cfg and compare(ours, source) == []
    assert run("export", tmp_path / "ours", tmp_path / "again", "--format", "torch-student") == 0
    files = [load_file(tmp_path / folder / "model.safetensors") for folder in ("torch", "again")]
    assert bits(files[0]) == bits(files[1])
    configs = [json.loads((tmp_path / folder / "config.json").read_text()) for folder in ("torch", "again")]
    assert configs[0]["architecture"] == configs[1]["architecture"]
    assert configs[1]["plan"]["sampler"] == "renoise" and configs[1]["latent_shape"] == [8, 4, 4, 4]


def test_layouts_that_are_recognised(tmp_path):
    state, diffusers = tensors(), tensors("diffusers")
    config = dict(num_heads=2, text_len=3, num_layers=3)
    half = len(state) // 2
    folder = tmp_path / "wan"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    shards = [dict(list(state.items())[:half]), dict(list(state.items())[half:])]
    for i, shard in enumerate(shards):
        save_file(shard, folder / f"x-{i + 1:05d}-of-00002.safetensors")
    weight_map = {name: f"x-{i + 1:05d}-of-00002.safetensors" for i, shard in enumerate(shards) for name in shard}
    assert open_source(folder).format == "original"  # shards without an index
    (folder / "x.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert open_source(folder).cfg.num_heads == 2
    assert open_source(folder / "x.safetensors.index.json").format == "original"
    pipeline = tmp_path / "pipeline"
    (pipeline / "transformer").mkdir(parents=True)
    save_file(diffusers, pipeline / "transformer" / "diffusion_pytorch_model.safetensors")
    (pipeline / "transformer" / "config.json").write_text(
        json.dumps(dict(num_attention_heads=2, attention_head_dim=12, num_layers=3, eps=1e-6))
    )
    assert open_source(pipeline, text_len=3).format == "diffusers"
    assert compare(open_source(pipeline, text_len=3), open_source(folder)) == []


class Malicious:
    """Runs a command when it is unpickled."""

    def __reduce__(self):
        return print, ("unpickled",)


def _write(state, path, **metadata):
    save_file(state, path, metadata=metadata or None)
    return path


def _truncated(tmp_path):
    path = _write(tensors(), tmp_path / "bad.safetensors")
    path.write_bytes(path.read_bytes()[:-100])
    return path


def _cut_header(tmp_path):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(struct.pack("<Q", 10**6) + b"{")
    return path


def _missing(tmp_path):
    return _write({n: x for n, x in tensors().items() if n != NAME}, tmp_path / "bad.safetensors")


def _unexpected(tmp_path):
    extra = {"blocks.0.cross_attn.k_img.weight": np.zeros((24, 24), np.float32)}
    return _write({**tensors(), **extra}, tmp_path / "bad.safetensors")


def _wrong_size(tmp_path):
    return _write({**tensors(), NAME: np.zeros((32, 23), np.float32)}, tmp_path / "bad.safetensors")


def _quantised(tmp_path):
    return _write({**tensors(), NAME: np.zeros((32, 24), np.int8)}, tmp_path / "bad.safetensors")


def _other_model(tmp_path):
    return _write({"encoder.conv1.weight": np.zeros(3, np.float32)}, tmp_path / "bad.safetensors")


def _missing_shard(tmp_path):
    _write(tensors(), tmp_path / "x-00001-of-00002.safetensors")
    index = {"weight_map": {NAME: "x-00002-of-00002.safetensors"}}
    (tmp_path / "x.safetensors.index.json").write_text(json.dumps(index))
    return tmp_path


def _nothing(tmp_path):
    (tmp_path / "empty").mkdir()
    return tmp_path / "empty"


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (_truncated, ["bad.safetensors", "truncated", "again"]),
        (_cut_header, ["bad.safetensors", "truncated", "again"]),
        (_missing, ["bad.safetensors", NAME, "missing"]),
        (_unexpected, ["bad.safetensors", "k_img", "text-to-video"]),
        (_wrong_size, ["bad.safetensors", NAME, "[32, 23]", "[32, 24]"]),
        (_quantised, ["bad.safetensors", NAME, "int8"]),
        (_other_model, ["bad.safetensors", "encoder.conv1.weight"]),
        (_missing_shard, ["index.json", "x-00002-of-00002.safetensors"]),
        (_nothing, ["empty", "name a folder"]),
    ],
)
def test_bad_safetensors(make, named, tmp_path, capsys):
    (tmp_path / "in").mkdir()
    check_refused(make(tmp_path / "in"), named, tmp_path, capsys)


def check_refused(path, named, tmp_path, capsys):
    before = sorted(tmp_path.iterdir())
    assert run("import", path, tmp_path / "out", *SIZES) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1
    assert all(word in err for word in named), err
    assert sorted(tmp_path.iterdir()) == before, "something was left behind"


def _to_nothing(tmp_path):
    (tmp_path / "bad.safetensors").symlink_to(tmp_path / "gone")
    return tmp_path


def _a_folder(tmp_path):
    (tmp_path / "bad.safetensors").mkdir()
    return tmp_path


def _index_of_a_folder(tmp_path):
    (tmp_path / "bad.safetensors.index.json").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    ("make", "reason"),
    [(_to_nothing, "No such file"), (_a_folder, "Is a directory"), (_index_of_a_folder, "Is a directory")],
)
def test_a_file_that_cannot_be_read(make, reason, tmp_path, capsys):
    (tmp_path / "in").mkdir()
    named = ["SRC: ", "bad.safetensors", f"cannot be read ({reason}", "download or copy it again"]
    check_refused(make(tmp_path / "in"), named, tmp_path, capsys)


class DictConfig(dict):
    """Stands in for omegaconf's class of this name: what matters is that its module is none that torch trusts."""


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (lambda s: {"generator": s, "config": DictConfig(a=1)}, ["DictConfig", "save its tensors alone"]),
        (lambda s: {"generator": s, "hook": Malicious()}, ["print", "could run code"]),
        (lambda s: {"optimizer": {"a": 1}}, ["no tensors", "optimizer"]),
        (lambda s: {"generator": {**s, "epoch": 4}}, ["epoch", "int"]),
        (lambda s: [1, 2], ["list"]),
        (lambda s: {"generator": {**s, "model._orig_mod." + NAME: s["model." + NAME]}}, [NAME, "same parameter"]),
    ],
)
def test_bad_pt(content, named, tmp_path, capsys):
    torch = pytest.importorskip("torch", reason="needs PyTorch: pip install 'greedy_distill_jax[parity]'")
    state = {f"model.{name}": torch.from_numpy(x.copy()) for name, x in tensors().items()}
    torch.save(content(state), tmp_path / "bad.pt")
    check_refused(tmp_path / "bad.pt", ["bad.pt", *named], tmp_path, capsys)


@pytest.mark.parametrize("kind", ["truncated", "pickle", "empty", "mark"])
def test_damaged_pt(kind, tmp_path, capsys):
    torch = pytest.importorskip("torch", reason="needs PyTorch: pip install 'greedy_distill_jax[parity]'")
    path = tmp_path / "bad.pt"
    torch.save({"generator": {"model.x": torch.zeros(4000)}}, path)
    data = {"truncated": path.read_bytes()[:-3000], "pickle": pickle.dumps(Malicious()), "empty": b""}.get(
        kind, b"\x80\x02e."
    )
    path.write_bytes(data)
    check_refused(path, ["bad.pt"], tmp_path, capsys)
    assert "unpickled" not in capsys.readouterr().out


def test_nothing_is_left_of_a_failed_export(tmp_path, monkeypatch, capsys):
    path = _write(tensors(), tmp_path / "in.safetensors")
    source = open_source(path, heads=2, text_len=3)
    read = source.read_layer
    count = []

    def broken(*args):
        count.append(1)
        if len(count) > 20:
            raise UserError("the disk is gone")
        return read(*args)

    monkeypatch.setattr(source, "read_layer", broken)
    for form, name in [("original", "out"), ("causal-pt", "out.pt")]:
        count.clear()
        if form == "causal-pt":
            pytest.importorskip("torch", reason="needs PyTorch: pip install 'greedy_distill_jax[parity]'")
        with pytest.raises(UserError, match="disk"):
            write(source, tmp_path / name, form)
        assert [p.name for p in tmp_path.iterdir()] == ["in.safetensors"]


def test_refusals_of_the_command(tmp_path, capsys):
    path = _write(tensors(), tmp_path / "in.safetensors")
    save_file({}, tmp_path / "taken.safetensors")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    cases = [
        (["import", tmp_path / "no", tmp_path / "out"], f"SRC: {tmp_path / 'no'} does not exist"),
        (["import", path, tmp_path / "taken.safetensors", *SIZES], "--overwrite: "),
        (["import", path, tmp_path / "out"], "--heads: "),
        (["import", path, tmp_path / "out", *SIZES, "--mesh", "fsdp"], "--mesh: 'fsdp' is not of the form"),
        (["import", path, tmp_path / "out", *SIZES, "--mesh", "fspd=1"], "--mesh: 'fspd' in 'fspd=1' is not an axis"),
        (["import", path, tmp_path / "out", *SIZES, "--mesh", "data=1,data=1"], "gives data twice"),
        (["inspect", path, *SIZES, "--part", "ema"], "--part: 'ema' is not in"),
        (["import", path, tmp_path / "loop", *SIZES], "--overwrite: "),
        (["inspect", path, *SIZES, "--step", "3"], "--step: 3 is asked for"),
        (["import", path, tmp_path, *SIZES, "--overwrite"], "DST: "),
        (["import", path, path, *SIZES, "--overwrite"], "which it is made of"),
        (["export", path, tmp_path / "out", "--format", "torch-student", *SIZES], "--format: "),
        (["export", path, tmp_path / "out", "--format", "causal-pt", *SIZES], "DST: "),
        (["export", path, tmp_path / "out", "--format", "original", *SIZES, "--shard-gb", "0"], "--shard-gb: "),
        (["verify", path, tmp_path / "no", *SIZES], f"B: {tmp_path / 'no'} does not exist"),
        (["export", path, tmp_path / "out", "--format", "nothing"], "nothing"),
    ]
    for argv, word in cases:
        assert run(*argv) == 2
        err = capsys.readouterr().err
        assert err.startswith("error: ") and err.count("\n") == 1 and word in err, (argv, err)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.safetensors", "loop", "taken.safetensors"]


@pytest.mark.parametrize(
    "name, text",
    [
        ("model.safetensors.index.json", '{"weight_map": {"a": null}}'),
        ("model.safetensors.index.json", '{"weight_map": {}}'),
        ("model.safetensors.index.json", "[" * 100_000),
        ("config.json", "[" * 100_000),
        ("config.json", "[]"),
    ],
)
def test_files_beside_weights_that_say_nothing(tmp_path, name, text, capsys):
    _write(tensors(), tmp_path / "model.safetensors")
    (tmp_path / name).write_text(text)
    assert run("inspect", tmp_path, *SIZES) == 2
    assert capsys.readouterr().err.startswith(f"error: SRC: {tmp_path / name} is no")


def test_inspect_and_verify(tmp_path, capsys):
    path = _write(tensors(dtype="bfloat16"), tmp_path / "in.safetensors")
    assert run("inspect", path, "--tensors", *SIZES) == 0
    out = capsys.readouterr().out
    assert "format        original" in out and "26,080 in 96 tensors" in out and "bfloat16 (42 stacked)" in out
    assert "blocks/ffn/up/kernel [3, 24, 32] bfloat16" in out
    other = _write(tensors(), tmp_path / "other.safetensors")
    assert run("verify", path, other, *SIZES) == 1
    assert "96 of 96 tensors differ" in capsys.readouterr().out
    assert run("verify", path, other, *SIZES, "--atol", "0.02") == 0


def test_bits_survive_a_wider_dtype(tmp_path):
    path = _write(tensors(dtype="bfloat16"), tmp_path / "in.safetensors")
    assert run("import", path, tmp_path / "ours", "--dtype", "float32", *SIZES) == 0
    assert open_source(tmp_path / "ours").dtypes["blocks/ffn/up/kernel"] == jnp.float32
    assert run("export", tmp_path / "ours", tmp_path / "out", "--format", "original", "--dtype", "bfloat16") == 0
    assert bits(load_file(tmp_path / "out" / "diffusion_pytorch_model.safetensors")) == bits(load_file(path))


def test_sharded_import(tmp_path):
    path = _write(tensors(), tmp_path / "in.safetensors")
    assert len(jax.devices()) == 8
    assert run("import", path, tmp_path / "ours", *SIZES, "--mesh", "fsdp=4,tensor=2") == 0
    assert compare(open_source(path, heads=2, text_len=3), open_source(tmp_path / "ours")) == []


@pytest.mark.parametrize("value", ["x", 1.5, None, [24]])
def test_a_field_of_another_type_is_no_architecture(value):
    with pytest.raises(UserError, match="text_len is .*; it must be a whole number"):
        as_config({"dim": 24, "num_heads": 2, "text_len": value})


def test_a_causal_student_with_two_sets_of_weights_is_no_dit_of_others():
    fields = {"kind": "causalstudent", **dataclasses.asdict(tiny.causal_config(context_weights="own"))}
    with pytest.raises(ValueError, match="weights of its own for the context pass; train one with 'shared'"):
        as_config(fields)
    assert as_config({**fields, "context_weights": "shared"}) == tiny.causal_config()


def test_what_a_file_says_of_itself_is_not_ignored(tiny_teacher, tmp_path, capsys):
    assert run("export", tiny_teacher, tmp_path / "wan", "--format", "original") == 0
    assert run("inspect", tmp_path / "wan", "--heads", "2", "--text-len", "6") == 0
    capsys.readouterr()
    for option, value in (("--heads", 3), ("--text-len", 7)):
        assert run("inspect", tmp_path / "wan", option, value) == 2
        assert capsys.readouterr().err.startswith(f"error: {option}: {value} is given, but ")
