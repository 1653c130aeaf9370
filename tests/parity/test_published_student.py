"""A causal student as it is published, from end to end: in, streamed, trained further, out to PyTorch and back."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from greedy_distill_jax import convert, evaluate, sample
from greedy_distill_jax.config import read_settings
from greedy_distill_jax.data.sources.cutting import Cutting
from greedy_distill_jax.data.sources.latents import prepare_latents
from greedy_distill_jax.data.sources.moving_shapes import captions
from greedy_distill_jax.data.sources.registry import load_source
from greedy_distill_jax.data.video_io import VideoWriter, probe
from greedy_distill_jax.eval.comparison import Held, load_runs
from greedy_distill_jax.eval.tables import NOT_THERE
from greedy_distill_jax.models.students.causal import CausalStudent
from greedy_distill_jax.models.wan.dit import Teacher
from greedy_distill_jax.runs import conversion
from greedy_distill_jax.runs.run import Run
from greedy_distill_jax.streaming.causal import CausalStreamer
from greedy_distill_jax.testing import tiny
from greedy_distill_jax.text.prompts import WAN_NEGATIVE_PROMPT
from greedy_distill_jax.text.write_store import write_text_store
from greedy_distill_jax.train import train
from greedy_distill_jax.weights.open import open_source
from greedy_distill_jax.weights.pipeline import save_codec
from greedy_distill_jax.weights.source import TreeSource
from greedy_distill_jax.weights.verify import compare
from greedy_distill_jax.weights.write import tensors_of
from tests.conftest import exit_code

torch = pytest.importorskip("torch", reason="needs PyTorch: pip install 'greedy_distill_jax[parity]'")

HELD = 6  # frames of the held-out latents
LONGLIVE = {"chunk": 3, "window": 12, "sink": 3}
PROMPTS = captions("train")[:3]


class Rows:
    """An encoder of random rows, the same for the same prompt; of all its rows the last is padding."""

    def __init__(self, text_len, text_dim):
        self.text_len, self.text_dim = text_len, text_dim

    def __call__(self, prompts):
        rows = np.zeros((len(prompts), self.text_len, self.text_dim), np.float32)
        for row, prompt in zip(rows, prompts, strict=True):
            row[:-1] = np.random.default_rng(sum(map(ord, prompt))).normal(size=row[:-1].shape)
        return rows


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with model.pt (generator_ema, critic), what encodes prompts and what decodes latents."""
    home, settings = tmp_path_factory.mktemp("published"), read_settings(tiny.train_config())
    wan = dataclasses.replace(settings.wan, prediction="velocity")
    parts = {}
    for seed, name in enumerate(("generator_ema", "critic")):
        source = TreeSource(wan, tiny.random_params(Teacher(wan), seed, (1, 4, 4, wan.channels)))
        state = tensors_of(source, "original", "float32")
        parts[name] = {f"model.{key}": torch.from_numpy(x.copy()) for key, x in state}
    torch.save(parts, home / "model.pt")
    every = [*captions("train"), *captions("held_out"), settings.data.negative_prompt, WAN_NEGATIVE_PROMPT]
    encoder, plan = Rows(wan.text_len, wan.text_dim), dict(text_len=wan.text_len, text_dim=wan.text_dim)
    write_text_store(every, home / "text", lambda: encoder, plan=plan, dtype="float32", progress=False)
    codec = load_source("moving_shapes")[1]
    save_codec(codec, home)
    sizes = ["--heads", wan.num_heads, "--text-len", wan.text_len]
    frames = [word for name, value in LONGLIVE.items() if name != "chunk" for word in (f"--{name}", value)]
    with pytest.MonkeyPatch.context() as patch:  # a smaller video than Wan's
        patch.setattr(conversion, "WAN_LATENT", (21, *codec.latent_shape(16, 16)[:2]))
        assert exit_code(convert.main, "import", home / "model.pt", home / "student", *sizes, *frames) == 0
        assert exit_code(convert.main, "import", home / "model.pt", home / "teacher", *sizes, "--part", "critic") == 0
    return home


def test_it_streams_as_its_peer_and_through_the_command(home, benchmarks, tmp_path, capsys):
    run = Run.load(home / "student", text=str(home / "text"), codec=home / "codec.npz")
    cfg = dataclasses.replace(run.model.cfg, base=dataclasses.replace(run.model.cfg.base, dtype="float32"))
    plan, latent = run.settings.plan, run.latent_shape[1:]
    streamer = CausalStreamer(CausalStudent(cfg), plan)
    rows = [run.text([prompt]) for prompt in PROMPTS]
    peer = benchmarks("torch_causal")
    other = peer.TorchCausal(run.params, cfg, np.asarray(rows[0]), plan.sigmas[0], latent[:2])
    state = streamer.init(run.params, rows[0], jax.random.key(7), latent)
    step, switch = jax.jit(streamer.step), jax.jit(streamer.switch_prompt)
    for i in range(8):
        if i in (3, 6):  # within the window, and behind it
            state = switch(run.params, state, rows[i // 3])
            other.switch_prompt(np.asarray(rows[i // 3]))
        noise = peer.step_noise(state, len(plan.sigmas[0]))
        state, ours = step(run.params, state)
        theirs, scale = other.step([other.tensor(x) for x in noise]).numpy(), max(1.0, float(jnp.std(ours)))
        np.testing.assert_allclose(theirs / scale, np.asarray(ours) / scale, atol=1e-5, rtol=1e-5, err_msg=f"chunk {i}")

    options = ["--checkpoint", home / "student", "--codec", home / "codec.npz", "--text", home / "text"]
    options += ["--frames", 9, "--prompt", PROMPTS[0], "--switch", f"6:{PROMPTS[1]}", "--output", tmp_path / "out.mp4"]
    assert exit_code(sample.main, *options) == 0
    assert probe(tmp_path / "out.mp4").frames == 9
    given = ["--given", tmp_path / "out.mp4", "--given-frames", 3, "--output", tmp_path / "longer.mp4"]
    assert exit_code(sample.main, *options[:-2], *given) == 0
    assert probe(tmp_path / "longer.mp4").frames == 9
    told = "out.mp4: 3 of 9 frames are given, cropped and resized from 128x128 to 16x16.\n"
    assert told in capsys.readouterr().err
    assert exit_code(sample.main, *options[:-2], *given, "--given-frames", 4) == 2
    assert "--given-frames: 4 frames do not fit the student's chunk of 3 latent frames" in capsys.readouterr().err
    assert run.streamer(context_sigma=(0.1,)).plan.context_sigmas == (0.1,)
    for level, said in (("0.7,0.7", "kept at noise level 0.7, above 0.625"), ("-1", "it must be at least 0")):
        assert exit_code(sample.main, *options, f"--context-sigma={level}") == 2
        error = capsys.readouterr().err
        assert "--context-sigma" in error and said in error


def _hashed(run):
    """Changes of a run that make it one on hashed words."""
    data = dataclasses.replace(run.settings.data, text="")
    return {"settings": dataclasses.replace(run.settings, data=data)}


def test_stage_two_goes_on_from_it_and_it_goes_out_and_back(home, tmp_path, capsys, monkeypatch):
    imported = Run.load(home / "student", needs_codec=False)
    student = imported.settings
    changes = {f"model__{name}": value for name, value in dataclasses.asdict(student.model).items() if value}
    changes |= {f"student__causal__{name}": value for name, value in dataclasses.asdict(student.student.causal).items()}
    config = tiny.train_config(
        "dmd",
        **changes,
        student__kind="causal",
        student__chunk=LONGLIVE["chunk"],
        student_from=str(home / "student"),
        teacher_from=str(home / "teacher"),
        data__text=str(home / "text"),
        data__frames=6,
        distill__generator_every=1,
        steps=2,  # the first of which warms up from a rate of 0
        checkpoint__every=2,
    )
    state = train(config, tmp_path / "stage2", show_progress=False)
    pairs = zip(jax.tree.leaves(state.nets["student"].params), jax.tree.leaves(imported.params), strict=True)
    moved = [float(np.abs(np.asarray(a, np.float32) - np.asarray(b, np.float32)).max()) for a, b in pairs]
    assert all(np.isfinite(moved)) and 0 < max(moved) < 0.1  # updated, from what was imported

    report = [
        "--teacher",
        home / "teacher",
        "--student",
        tmp_path / "stage2",
        "--more",
        f"published={home / 'student'}",
    ]
    report += ["--output", tmp_path / "report", "--videos", 2, "--suite", "cache_bytes"]
    assert exit_code(evaluate.main, *report, "--text", home / "text") == 2  # the run tells it
    error = capsys.readouterr().err
    assert "error: --text: the runs are compared on moving_shapes, with " in error
    assert f"leave {home / 'text'} out." in error
    load = Run.load
    for change, said in (
        ({"latent_shape": (6, 3, 4, 16)}, "sides that 2 divides, and those of the data are 3x4 of 16 channels; give"),
        (_hashed, "was trained with a text encoder, and the captions of the data are embedded by hashed words; give"),
    ):

        def other(directory, *, change=change, **options):
            run = load(directory, **options)
            if directory != str(tmp_path / "stage2"):
                return run
            return dataclasses.replace(run, **(change(run) if callable(change) else change))

        with monkeypatch.context() as patch:
            patch.setattr(Run, "load", other)
            assert exit_code(evaluate.main, *report) == 2
        error = capsys.readouterr().err
        assert f"error: --teacher: {home / 'teacher'} " in error and said in error
    assert exit_code(evaluate.main, *report) == 0
    rows = json.loads((tmp_path / "report" / "metrics.json").read_text())["rows"]
    assert {row["name"]: row["train_cpu_s"] != NOT_THERE for row in rows} == {
        "data": False,
        "teacher": False,
        "stage1": True,
        "stage1_few_steps": True,
        "published": False,
    }

    trained = open_source(tmp_path / "stage2", part="params")
    target = tmp_path / "out.pt"
    options = ["--format", "causal-pt", "--part", "params"]
    assert exit_code(convert.main, "export", tmp_path / "stage2", target, *options) == 0
    held = torch.load(target, weights_only=True)["generator_ema"]
    assert set(held) == set(torch.load(home / "model.pt", weights_only=True)["generator_ema"])
    assert exit_code(convert.main, "import", target, tmp_path / "back") == 0
    back = open_source(tmp_path / "back")
    assert compare(back, trained) == [] and back.cfg == trained.cfg


@pytest.fixture(scope="module")
def latents(home):
    """A folder of latents of another length than the weights were trained on."""
    videos, lines = load_source("moving_shapes", frames=HELD * 2)[0], ["clip,caption"]
    (home / "clips").mkdir()
    for number in range(2):
        lines.append(f"{number}.mp4,{videos[number]['caption']}")
        with VideoWriter(home / f"clips/{number}.mp4", fps=8) as writer:
            for frame in videos[number]["video"]:
                writer.write(frame)
    (home / "captions.csv").write_text("\n".join(lines))
    for name, held_out in (("latents", 0.5), ("none_held", 0.0)):
        cutting = Cutting(width=16, height=16, frames=HELD, held_out=held_out)
        codec = load_source("moving_shapes")[1]
        prepare_latents(home / "clips", home / "captions.csv", home / name, cutting, codec, progress=False)
    return home / "latents"


def test_it_is_evaluated_on_named_data(home, latents, tmp_path, capsys):
    """Nothing was trained here: held-out videos, their captions' encoder and the decoder are named."""
    sizes = [
        "--heads",
        read_settings(tiny.train_config()).wan.num_heads,
        "--text-len",
        Run.load(home / "student", needs_codec=False).settings.wan.text_len,
    ]
    assert (
        exit_code(
            convert.main,
            "import",
            home / "model.pt",
            tmp_path / "student",
            *sizes,
            "--chunk",
            2,
            "--window",
            4,
            "--sink",
            0,
        )
        == 0
    )
    options = [
        "--teacher",
        home / "teacher",
        "--student",
        tmp_path / "student",
        "--output",
        tmp_path / "report",
        "--videos",
        2,
    ]
    assert exit_code(evaluate.main, *options) == 2
    assert "error: --data: none of these was trained here" in capsys.readouterr().err
    options += ["--data", f"latents:{latents}", "--codec", home / "codec.npz", "--suite", "cache_bytes"]
    assert exit_code(evaluate.main, *options) == 2
    assert "error: --text: " in capsys.readouterr().err and not (tmp_path / "report").exists()
    options += ["--text", home / "text"]
    (tmp_path / "prompts.txt").write_text(PROMPTS[0])
    for source, said in (
        ("latent", "data 'latent' is unknown; use one of"),
        (f"latents:{home / 'none_held'}", "has no held-out windows; prepare it again with a held-out share above 0"),
        (f"prompts:{tmp_path / 'prompts.txt'}", "holds no videos; name data with videos"),
    ):
        assert exit_code(evaluate.main, *options, "--data", source) == 2
        error = capsys.readouterr().err
        assert "error: --data: " in error and said in error
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    for option, value, said in (
        ("--teacher", tmp_path / "empty", "--teacher: "),
        ("--more", f"other={tmp_path / 'empty'}", "--more: other: "),
    ):
        assert exit_code(evaluate.main, *options, option, value) == 2
        assert f"error: {said}{tmp_path / 'empty' / 'checkpoints'}" in capsys.readouterr().err
    held = Held("moving_shapes", str(home / "text"), home / "codec.npz")
    drawn = load_runs(home / "teacher", tmp_path / "student", {}, held)["stage1"]
    assert drawn.latent_shape[0] == drawn.settings.data.frames == 21  # as the weights were trained
    assert exit_code(evaluate.main, *options) == 0
    metrics = json.loads((tmp_path / "report" / "metrics.json").read_text())
    assert metrics["training_frames"] == HELD
    assert [row["name"] for row in metrics["rows"]] == ["data", "teacher", "stage1", "stage1_few_steps"]
    assert {row[key] for row in metrics["rows"] for key in ("train_cpu_s", "train_seed")} == {NOT_THERE}
