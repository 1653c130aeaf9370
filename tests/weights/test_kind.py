"""Teachers and causal students, whose tensors are the same: what a file is survives its import."""

import dataclasses
import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from greedy_distill_jax import convert, sample
from greedy_distill_jax.config import read_settings
from greedy_distill_jax.data.sources.registry import load_source
from greedy_distill_jax.data.video_io import probe
from greedy_distill_jax.errors import UserError
from greedy_distill_jax.models.students.causal import CausalStudent
from greedy_distill_jax.models.students.config import CausalConfig
from greedy_distill_jax.models.wan.config import WanConfig
from greedy_distill_jax.models.wan.dit import Teacher
from greedy_distill_jax.runs import conversion
from greedy_distill_jax.runs.run import Run
from greedy_distill_jax.streaming.causal import CausalStreamer
from greedy_distill_jax.testing import tiny
from greedy_distill_jax.text.prompts import WAN_NEGATIVE_PROMPT
from greedy_distill_jax.training.sources import load_sources
from greedy_distill_jax.weights.kind import Asked, causal_json, with_kind
from greedy_distill_jax.weights.open import open_source
from greedy_distill_jax.weights.pipeline import save_codec, transformer_config
from greedy_distill_jax.weights.source import HASHED, TreeSource
from greedy_distill_jax.weights.verify import compare
from greedy_distill_jax.weights.write import tensors_of, write
from tests.conftest import exit_code

run = functools.partial(exit_code, convert.main)

BASE = dataclasses.replace(tiny.BASE, prediction="velocity", num_layers=2)
SIZES = ["--heads", "2", "--text-len", "3"]
LONGLIVE = ["--window", "12", "--sink", "3"]


def state(seed=0, base=BASE):
    source = TreeSource(base, tiny.random_params(Teacher(base), seed))
    return dict(tensors_of(source, "original", "float32"))


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A file as Self-Forcing publishes it, of random weights."""
    torch = pytest.importorskip("torch", reason="needs PyTorch: pip install 'greedy_distill_jax[parity]'")
    path = tmp_path_factory.mktemp("published") / "self_forcing_dmd.pt"
    parts = {
        name: {f"model.{key}": torch.from_numpy(x.copy()) for key, x in state(seed).items()}
        for seed, name in enumerate(("generator", "critic", "generator_ema"))
    }
    torch.save(parts, path)
    return path


def test_a_published_causal_student(published, benchmarks, tmp_path, capsys):
    assert run("import", published, tmp_path / "sf", *SIZES) == 0
    out = capsys.readouterr().out
    assert "kind: causal student (the part generator_ema is a generator; chunk 3, window 0, sink 0 assumed" in out
    assert "a causal student (2 layers, dim 24, ffn 32, 2 heads, chunk 3, all of 21 frames, sink 0)" in out
    imported = Run.load(tmp_path / "sf", needs_codec=False)
    cfg, plan = imported.model.cfg, imported.settings.plan
    assert isinstance(imported.model, CausalStudent) and imported.encoder is None
    assert (cfg.chunk, cfg.window, cfg.sink, cfg.max_frames, cfg.recache) == (3, 0, 0, 21, False)
    assert plan.sampler == "renoise" and plan.sigmas == ((1.0, 0.9375, 5 / 6, 0.625),)

    assert run("import", published, tmp_path / "ll", *SIZES, *LONGLIVE) == 0
    longlive = Run.load(tmp_path / "ll", needs_codec=False).model.cfg
    assert (longlive.chunk, longlive.window, longlive.sink, longlive.recache) == (3, 12, 3, True)
    assert (longlive.recache_of, longlive.global_sink) == ("window", True)

    peer, latent, text = benchmarks("torch_causal"), (4, 6, 4), tiny.text_rows(1, jax.random.key(1))
    for found, chunks in ((cfg, 2), (longlive, 6)):
        cfg = dataclasses.replace(found, base=dataclasses.replace(found.base, dtype="float32", remat="none"))
        streamer = CausalStreamer(CausalStudent(cfg), plan)
        other = peer.TorchCausal(imported.params, cfg, np.asarray(text), plan.sigmas[0], latent[:2])
        now, step = streamer.init(imported.params, text, jax.random.key(7), latent), jax.jit(streamer.step)
        for _ in range(chunks):
            noise = peer.step_noise(now, 4)
            now, ours = step(imported.params, now)
            theirs, scale = other.step([other.tensor(x) for x in noise]).numpy(), max(1.0, float(jnp.std(ours)))
            np.testing.assert_allclose(theirs / scale, np.asarray(ours) / scale, atol=2e-5, rtol=0)

    for form, target in (("causal-pt", "out.pt"), ("original", "out"), ("diffusers", "out2")):  # and back
        assert run("export", tmp_path / "ll", tmp_path / target, "--format", form) == 0
        back = open_source(tmp_path / target)
        assert back.cfg == open_source(tmp_path / "ll").cfg
        assert compare(back, open_source(tmp_path / "ll")) == []
    assert run("export", tmp_path / "sf", tmp_path / "whole", "--format", "original") == 0
    said = json.loads((tmp_path / "whole" / "config.json").read_text())
    assert (said["local_attn_size"], said["sink_size"], said["num_frame_per_block"]) == (-1, 0, 3)
    own = dataclasses.replace(back.cfg, rope_mode="relative", recache_of="ring")  # what no published file says
    here, asked = causal_json(own), Asked()
    assert with_kind(tmp_path, own.base, asked, part="", wrapper="", config=here)[0] == own
    said = json.loads((tmp_path / "out" / "config.json").read_text())
    assert said["_class_name"] == "CausalWanModel" and (said["local_attn_size"], said["sink_size"]) == (12, 3)
    assert run("import", tmp_path / "out.pt", tmp_path / "again", "--kind", "teacher") == 2
    assert "--kind: teacher is given, but" in capsys.readouterr().err


def test_stage_two_starts_from_a_published_student(published, tmp_path):
    assert run("import", published, tmp_path / "student", *SIZES, *LONGLIVE) == 0
    assert run("import", published, tmp_path / "teacher", *SIZES, "--part", "critic") == 0
    student = Run.load(tmp_path / "student", needs_codec=False).settings
    changes = {f"model__{name}": value for name, value in dataclasses.asdict(student.model).items() if value}
    changes |= {f"student__causal__{name}": value for name, value in dataclasses.asdict(student.student.causal).items()}
    sources = {f"{name}_from": str(tmp_path / name) for name in ("student", "teacher")}
    settings = read_settings(
        tiny.train_config("dmd", **changes, **sources, student__kind="causal", student__chunk=3, data__frames=21)
    )
    found = load_sources(settings, settings.kind.wanted(settings), resumed=False)
    assert found["student"].is_student and not found["teacher"].is_student


@pytest.mark.parametrize(
    ("part", "config", "options", "wanted"),
    [
        ("critic", {}, [], "teacher (the part critic is a critic"),
        ("model", {}, [], "teacher (nothing in it says that it is causal"),
        ("model", {}, ["--kind", "causal"], "causal student (as asked for"),
        ("generator", {}, ["--kind", "teacher"], "teacher (as asked for"),
        ("model", {"local_attn_size": 12, "sink_size": 3}, [], "causal student (config.json has local_attn_size"),
        ("model", {"local_attn_size": -1, "sink_size": 0}, [], "causal student (config.json has local_attn_size"),
        ("", {"_class_name": "CausalWanModel"}, [], "causal student (config.json has CausalWanModel"),
        ("", {"_class_name": "WanModel"}, [], "teacher (nothing in it says"),
    ],
)
def test_what_a_kind_is_chosen_by(part, config, options, wanted, tmp_path, capsys):
    torch = pytest.importorskip("torch", reason="needs PyTorch: pip install 'greedy_distill_jax[parity]'")
    tensors = {f"model.{name}": torch.from_numpy(x.copy()) for name, x in state().items()}
    torch.save({part: tensors} if part else tensors, tmp_path / "in.pt")
    if config:
        (tmp_path / "config.json").write_text(json.dumps(config))
    assert run("inspect", tmp_path / "in.pt", *SIZES, *options) == 0
    out = capsys.readouterr().out
    assert f"kind          {wanted}" in out
    if config.get("local_attn_size"):
        window = max(0, config["local_attn_size"])
        assert f"window = {window}\n" in out and f"sink = {config['sink_size']}\n" in out


def test_a_kind_is_told_by_a_model_inside_of_a_dictionary(tmp_path, capsys):
    torch = pytest.importorskip("torch", reason="needs PyTorch: pip install 'greedy_distill_jax[parity]'")
    tensors = {
        f"{name}.model.{key}": torch.from_numpy(x.copy())
        for seed, name in enumerate(("generator", "critic"))
        for key, x in state(seed).items()
    }
    torch.save({"state_dict": tensors, "optimizer": {"m": torch.zeros(2)}}, tmp_path / "both.pt")
    parts = f"parts         state_dict ({len(tensors)}), optimizer (1), generator.model, critic.model\n"
    for part, title, kind in (
        ("", "state_dict.generator.model", "causal student (the part state_dict.generator.model is a generator"),
        ("critic", "state_dict.critic", "teacher (the part state_dict.critic is a critic"),
        ("state_dict.critic.model", "state_dict.critic.model", "teacher (the part state_dict.critic.model is a critic"),
    ):
        assert run("inspect", tmp_path / "both.pt", *SIZES, "--part", part) == 0
        out = capsys.readouterr().out
        assert f"format        causal-pt, part {title}, " in out and f"kind          {kind}" in out and parts in out
    assert run("inspect", tmp_path / "both.pt", *SIZES, "--part", "ema") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --part: 'ema' is not in ") and "it has generator.model, critic.model" in error
    critic = open_source(tmp_path / "both.pt", part="critic", heads=2, text_len=3)
    write(critic, tmp_path / "out.pt", "causal-pt")
    assert compare(critic, open_source(tmp_path / "out.pt")) == []
    save_file({f"generator_ema.model.{key}": x for key, x in state().items()}, tmp_path / "flat.safetensors")
    assert run("inspect", tmp_path / "flat.safetensors", *SIZES) == 0
    assert "causal student (the wrapper generator_ema.model. is a generator" in capsys.readouterr().out


def test_frames_that_are_no_causal_students(tmp_path, capsys):
    save_file(state(), tmp_path / "in.safetensors")
    for options, said in (
        (["--window", "12"], "--window: 12 is given, but .* is taken as a teacher"),
        (["--kind", "causal", "--window", "10"], "--window: .*CausalConfig.window is 10 latent frames"),
        (["--kind", "causal", "--chunk", "2", "--window", "4", "--sink", "4"], "--window: .*window is 4"),
    ):
        assert run("import", tmp_path / "in.safetensors", tmp_path / "no", *SIZES, *options) == 2
        assert re.search(said, (error := capsys.readouterr().err)), error
    (tmp_path / "config.json").write_text(json.dumps({"local_attn_size": -1, "independent_first_frame": True}))
    assert run("inspect", tmp_path / "in.safetensors", *SIZES) == 2
    assert "config.json has independent_first_frame, a first chunk of one frame" in capsys.readouterr().err
    write(TreeSource(BASE, tiny.random_params(Teacher(BASE))), tmp_path / "wan", "original")
    assert run("inspect", tmp_path / "wan", "--sink", "3") == 2
    assert "--sink: 3 is given, but" in capsys.readouterr().err


@pytest.mark.parametrize(("chunk", "frames"), [(2, 20), (5, 20), (24, 24)])
def test_an_imported_video_has_whole_chunks(chunk, frames, tmp_path):
    save_file(state(), tmp_path / "in.safetensors")
    options = ["--kind", "causal", "--chunk", chunk, "--window", 2 * chunk]
    assert run("import", tmp_path / "in.safetensors", tmp_path / "ours", *SIZES, *options) == 0
    imported = Run.load(tmp_path / "ours", needs_codec=False)
    assert imported.latent_shape[0] == imported.settings.data.frames == frames
    assert imported.model.cfg.chunk == imported.settings.student.chunk == chunk


def test_a_teacher_is_sampled_as_wan_is(tmp_path):
    save_file(state(), tmp_path / "in.safetensors")
    assert run("import", tmp_path / "in.safetensors", tmp_path / "wan", *SIZES) == 0
    settings = Run.load(tmp_path / "wan", needs_codec=False).settings
    own = settings.sample
    assert (own.sampler, own.steps, own.shift, own.guidance) == ("unipc_wan", 50, 5.0, 5.0)
    assert settings.data.negative_prompt == WAN_NEGATIVE_PROMPT and settings.log.fps == 16
    folder = tmp_path / "pipeline"
    (folder / "transformer").mkdir(parents=True)
    (folder / "scheduler").mkdir()
    write(TreeSource(BASE, tiny.random_params(Teacher(BASE))), tmp_path / "made", "diffusers")
    (tmp_path / "made" / "diffusion_pytorch_model.safetensors").rename(folder / "transformer" / "x.safetensors")
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps({"flow_shift": 3.0}))
    assert run("import", folder, tmp_path / "other", *SIZES) == 0
    own = Run.load(tmp_path / "other", needs_codec=False).settings.sample
    assert (own.sampler, own.steps, own.shift, own.guidance) == ("unipc", 50, 3.0, 5.0)


def test_a_causal_transformer_makes_no_whole_videos(tmp_path):
    source = TreeSource(CausalConfig(BASE), tiny.random_params(Teacher(BASE)))
    write(source, tmp_path / "folder" / "transformer", "diffusers")
    with pytest.raises(UserError, match="a causal student .* makes no whole videos"):
        transformer_config(tmp_path / "folder")


def test_words_are_not_embedded_for_weights_of_a_text_encoder(published, tmp_path, capsys):
    assert run("import", published, tmp_path / "sf", *SIZES) == 0
    codec = load_source("moving_shapes")[1]
    save_codec(codec, tmp_path)
    options = ["--checkpoint", tmp_path / "sf", "--codec", tmp_path / "codec.npz", "--prompt", "a", "--frames", "3"]
    capsys.readouterr()
    assert exit_code(sample.main, *options, "--output", tmp_path / "out.mp4") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --text: ") and "trained with a text encoder" in error
    assert run("export", tmp_path / "sf", tmp_path / "out.pt", "--format", "causal-pt") == 0
    assert run("import", tmp_path / "out.pt", tmp_path / "back") == 0
    with pytest.raises(UserError, match="trained with a text encoder"):
        Run.load(tmp_path / "back", codec=tmp_path / "codec.npz")


def test_a_causal_student_of_hashed_words_streams_and_switches(tmp_path, monkeypatch, capsys):
    codec, settings = load_source("moving_shapes")[1], read_settings(tiny.train_config())
    wan = dataclasses.replace(settings.wan, prediction="velocity", dtype="float32", remat="none")
    source = TreeSource(
        CausalConfig(wan), tiny.random_params(Teacher(wan), latent_shape=(1, 4, 4, wan.channels)), {"text": HASHED}
    )
    write(source, tmp_path / "student.pt", "causal-pt")
    monkeypatch.setattr(conversion, "WAN_LATENT", (12, *codec.latent_shape(16, 16)[:2]))
    assert run("import", tmp_path / "student.pt", tmp_path / "ours") == 0
    assert "causal student (it says so itself" in capsys.readouterr().out
    save_codec(codec, tmp_path)
    options = ["--checkpoint", tmp_path / "ours", "--codec", tmp_path / "codec.npz", "--frames", "6", "--prompt", "red"]
    assert exit_code(sample.main, *options, "--switch", "3:blue", "--output", tmp_path / "out.mp4") == 0
    assert probe(tmp_path / "out.mp4").frames == 6
    assert isinstance(open_source(tmp_path / "ours").cfg, CausalConfig)
    assert not isinstance(open_source(tmp_path / "ours").cfg, WanConfig)
