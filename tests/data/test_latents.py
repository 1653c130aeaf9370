"""Latents of clips: the windows of `prepare clips`, encoded; killed jobs, shared jobs, training from the folder."""

import json
import pickle
import shutil
import subprocess
import sys

import numpy as np
import pytest

from greedy_distill_jax import cli, prepare
from greedy_distill_jax.codecs.patch import PatchCodec
from greedy_distill_jax.data.loader import make_loader, videos_of
from greedy_distill_jax.data.sources import windows
from greedy_distill_jax.data.sources.cutting import Cutting, cut
from greedy_distill_jax.data.sources.latents import LATENTS
from greedy_distill_jax.data.sources.protocol import captions_of
from greedy_distill_jax.data.sources.registry import load_source
from greedy_distill_jax.data.video_io import VideoWriter
from greedy_distill_jax.errors import UserError
from greedy_distill_jax.runs.run import Run
from greedy_distill_jax.storage.lock import sole_writer
from greedy_distill_jax.storage.sharded import ShardedSource
from greedy_distill_jax.testing import tiny
from greedy_distill_jax.text.hashed_words import HashWordEncoder
from greedy_distill_jax.train import train

CUTTING = Cutting(width=16, height=16, frames=4, fps=None, stride=2)
OPTIONS = ("--size", "16x16", "--frames", "4", "--stride", "2", "--group", "2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Five clips of different sizes and lengths, one broken, one too short; a codec."""
    root = tmp_path_factory.mktemp("latents")
    (root / "in").mkdir()
    rng = np.random.default_rng(0)
    lines = ["clip,caption"]
    for number, (frames, size) in enumerate([(20, (48, 64)), (9, (64, 48)), (3, (32, 32)), (12, (32, 32))]):
        pattern = rng.integers(0, 256, (*size, 3), np.uint8)
        with VideoWriter(root / f"in/{number}.mp4", fps=10) as writer:
            for t in range(frames):
                writer.write(np.roll(pattern, t, axis=1))
        lines.append(f"{number}.mp4,pattern {number}")
    (root / "in/1b.mp4").write_bytes(rng.bytes(3000))
    (root / "captions.csv").write_text("\n".join([*lines, "1b.mp4,broken"]))
    PatchCodec.fit(rng.integers(0, 256, (8, 16, 16, 3), np.uint8)).save(root / "codec.npz")
    return root


def run(folder, output, *more, codec=None):
    options = ["--clips", folder / "in", "--captions", folder / "captions.csv", "--output", output, *OPTIONS, *more]
    with pytest.raises(SystemExit) as end:
        cli.run(prepare.main, ["latents", *map(str, options), "--codec", str(codec or folder / "codec.npz")])
    return end.value.code


@pytest.fixture(scope="module")
def prepared(folder):
    assert run(folder, folder / "out") == 0
    return folder / "out"


def everything(output):
    """Per split the list of (caption, latents)."""
    return {
        split: [(item["caption"], item["latents"]) for item in map(source.__getitem__, range(len(source)))]
        for split in ("train", "held_out")
        for source in [pickle.loads(pickle.dumps(ShardedSource(output, LATENTS, split)))]
    }


def assert_same(a, b):
    for split in a:
        assert [caption for caption, _ in a[split]] == [caption for caption, _ in b[split]]
        for (_, mine), (_, other) in zip(a[split], b[split], strict=True):
            np.testing.assert_array_equal(mine, other)


def test_latents_are_the_encoded_windows(prepared, folder):
    codec, found = PatchCodec.load(folder / "codec.npz"), everything(prepared)
    want = {"train": [], "held_out": []}
    for name in ("0.mp4", "1.mp4", "3.mp4"):
        _, starts, video = cut(folder / "in" / name, CUTTING)
        for split, cuts in want.items():
            cuts += [(f"pattern {name[0]}", codec.encode(video[0][s : s + 4])) for s in starts[split]]
    assert len(want["train"]) > 8 and want["held_out"]
    assert_same(found, want)
    source = ShardedSource(prepared, LATENTS)
    assert source.info["latent_shape"] == [4, 4, 4, 16] and source[0]["latents"].shape == (4, 4, 4, 16)
    assert [skipped["clip"] for skipped in source.info["skipped"]] == ["1b.mp4", "2.mp4"]
    assert captions_of(source) == {"pattern 0", "pattern 1", "pattern 3"} and source.info["fps"] == 10
    with pytest.raises(IndexError):
        source[len(source)]


def test_the_loader_reads_them(prepared):
    source, codec = load_source(f"latents:{prepared}", frames=4)
    assert isinstance(codec, PatchCodec)
    batch = next(
        make_loader(source, codec=codec, text_encoder=HashWordEncoder(), global_batch=2, seed=0, shuffle=False)
    )
    np.testing.assert_array_equal(batch["latents"], [source[0]["latents"], source[1]["latents"]])
    np.testing.assert_array_equal(batch["text"], HashWordEncoder()(["pattern 0"] * 2))
    assert videos_of([source[0]], codec).shape == (1, 4, 16, 16, 3)
    with pytest.raises(UserError, match="holds frames=4, asked for 8; .* prepare the latents again"):
        load_source(f"latents:{prepared}", frames=8)


def test_a_killed_job_goes_on_without_gap_or_repeat(prepared, folder, tmp_path, monkeypatch):
    real = windows.cut

    def until_the_last(path, cutting):
        if path.name == "3.mp4":
            raise KeyboardInterrupt
        return real(path, cutting)

    with monkeypatch.context() as patch:
        patch.setattr(windows, "cut", until_the_last)
        assert run(folder, tmp_path / "out") == 130
    with pytest.raises(UserError, match="not finished"):
        ShardedSource(tmp_path / "out", LATENTS)
    assert run(folder, tmp_path / "out") == 0
    assert_same(everything(tmp_path / "out"), everything(prepared))
    same = ShardedSource(tmp_path / "out", LATENTS).fingerprint
    assert same == ShardedSource(prepared, LATENTS).fingerprint
    info = json.loads((tmp_path / "out" / "dataset.json").read_text())
    told = {"codec": "/moved", "skipped": [{"clip": "x", "reason": "/moved/x is cut off"}]}
    (tmp_path / "out" / "dataset.json").write_text(json.dumps({**info, **told}))
    assert same == ShardedSource(tmp_path / "out", LATENTS).fingerprint
    info["shards"]["train"][0]["sha256"] = "0"
    (tmp_path / "out" / "dataset.json").write_text(json.dumps(info))
    assert same != ShardedSource(tmp_path / "out", LATENTS).fingerprint


@pytest.mark.subprocesses
def test_kill_9_leaves_no_gap_and_no_repeat(prepared, folder, tmp_path, subprocess_env):
    output = tmp_path / "out"
    options = ["--clips", folder / "in", "--captions", folder / "captions.csv", "--output", output, *OPTIONS]
    options += ["--codec", folder / "codec.npz", "--group", "1"]
    # It stops for good where a part is written and the next one half, and says so; there it is killed.
    stops = (
        "import pathlib, signal, sys\nfrom greedy_distill_jax import cli, prepare\n"
        "from greedy_distill_jax.data.sources import windows\n"
        f"output, real = pathlib.Path({str(output)!r}), windows.encode_record\n"
        "def encode_record(*a, **k):\n"
        "    if (output / 'parts' / '00000.json').exists() and list(output.glob('.*.partial')):\n"
        "        print('half', flush=True)\n"
        "        signal.pause()\n"
        "    return real(*a, **k)\n"
        "windows.encode_record = encode_record\n"
        "cli.run(prepare.main, sys.argv[1:])"
    )
    command = [sys.executable, "-c", stops, "latents", *map(str, options)]
    job = subprocess.Popen(command, env=subprocess_env, stdout=subprocess.PIPE, text=True)
    try:
        assert "half\n" in job.stdout, "it ended before it could be killed"
    finally:
        job.kill()
        job.wait()
        job.stdout.close()
    assert list(output.glob(".*.partial")), "nothing was half-written; the test killed at the wrong moment"
    assert run(folder, output, "--group", "1") == 0
    assert not list(output.glob(".*.partial"))
    assert_same(everything(output), everything(prepared))


def test_a_multi_process_job_takes_its_share_from_jax(prepared, folder, tmp_path, monkeypatch):
    for index in (1, 0):
        monkeypatch.setattr(prepare.join, "share", lambda index=index: (index, 2))
        assert run(folder, tmp_path / "out") == 0
        assert len(list((tmp_path / "out" / "parts").iterdir())) == 3 - index
    assert_same(everything(tmp_path / "out"), everything(prepared))


@pytest.mark.parametrize("name", ["nowhere", "nowhere.npz", "nowhere/vae.safetensors"])
def test_a_mistyped_codec_names_the_option(folder, tmp_path, capsys, name):
    assert run(folder, tmp_path / "out", codec=tmp_path / name) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: --codec: {tmp_path / name} does not exist; give a codec.npz, ")
    assert "vae/" in line and not (tmp_path / "out").exists()


def test_processes_share_the_clips(prepared, folder, tmp_path, capsys):
    for index in (2, 0, 1):
        assert run(folder, tmp_path / "out", "--shard-index", index, "--num-shards", 3) == 0
    assert "finished when the others are" in capsys.readouterr().out
    assert_same(everything(tmp_path / "out"), everything(prepared))


def test_half_precision_is_read_as_float32(prepared, folder, tmp_path):
    assert run(folder, tmp_path / "out", "--dtype", "bfloat16") == 0
    half, full = ShardedSource(tmp_path / "out", LATENTS)[0]["latents"], ShardedSource(prepared, LATENTS)[0]["latents"]
    assert half.dtype == np.float32 and (half != full).any()
    np.testing.assert_allclose(half, full, rtol=2**-8, atol=1e-6)


def test_a_teacher_trains_on_the_folder(prepared, folder, tmp_path):
    shutil.copytree(prepared, source := tmp_path / "latents")
    config = tiny.train_config(data__source=f"latents:{source}", steps=1, data__batch=8)
    train(config, tmp_path / "run", show_progress=False)
    trained = Run.load(tmp_path / "run")
    with sole_writer(tmp_path / "run"), pytest.raises(UserError, match="run is being written by another process"):
        train(config, tmp_path / "run")
    assert run(folder, source, "--group", "1", "--overwrite") == 0  # the same records in other shards
    with pytest.raises(UserError, match=r"other content of config.data.source = 'latents:.*; prepare it again from"):
        train(config, tmp_path / "run")
    assert trained.latent_shape == (4, 4, 4, 16)
    assert trained.sample_videos(["pattern 0"], steps=1).shape == (1, 4, 16, 16, 3)
    with pytest.raises(UserError, match="changes pixels, but"):
        train(
            tiny.train_config(data__source=f"latents:{prepared}", data__augment="labelled"),
            tmp_path / "x",
            show_progress=False,
        )


def test_damage_names_the_record(prepared, folder, tmp_path):
    assert run(folder, tmp_path / "out", "--group", "9") == 0
    info = tmp_path / "out" / "dataset.json"
    info.write_text(json.dumps({**json.loads(info.read_text()), "latent_shape": [5, 4, 4, 16]}))
    with pytest.raises(UserError, match=r"record 0 of .*train-00000-of-00001.* \(index 0 of train\) is damaged"):
        ShardedSource(tmp_path / "out", LATENTS)[0]
    with pytest.raises(UserError, match="split='test' is unknown"):
        ShardedSource(tmp_path / "out", LATENTS, "test")


@pytest.mark.parametrize(
    "more, codec, message",
    [
        (["--size", "18x16"], None, "multiples of 4"),
        (["--size", "big"], None, "is not WIDTHxHEIGHT"),
        (["--frames", "0"], None, "--frames: it is 0; it must be at least 1"),
        (["--held-out", "1"], None, "--held-out: it is 1; it must be from 0 to below 1"),
        (["--group", "0"], None, "--group: it is 0; it must be at least 1"),
        (["--frames", "40"], None, "none of the 5 clips gives a window"),
        (["--captions", "/nowhere.csv"], None, "--captions: /nowhere.csv cannot be read"),
        (["--text-model", "/nowhere"], None, "--text-model: model folder /nowhere has no tokenizer/"),
        ([], "/nowhere", "--codec: /nowhere does not exist; give a codec.npz"),
        ([], "captions.csv", "has no vae/ and no codec.npz"),
    ],
)
def test_bad_input_is_one_line_and_code_2(folder, tmp_path, capsys, more, codec, message):
    assert run(folder, tmp_path / "out", *more, codec=codec and folder / codec) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_other_settings_need_another_folder(prepared, folder, capsys):
    assert run(folder, prepared, "--fps", "5") == 2
    assert "was begun with fps = None, not 5.0" in capsys.readouterr().err


def test_captions_go_into_a_store_beside_the_latents(folder, tmp_path):
    pytest.importorskip("transformers", reason="needs transformers: pip install 'greedy_distill_jax[torch]'")
    from greedy_distill_jax.testing import wan_folder
    from greedy_distill_jax.text.store import TextStore

    model = wan_folder.write_text_folder(tmp_path / "model")
    more = ("--text-model", model, "--text-len", 9, "--negative", "worst quality")
    for index in (0, 1):
        assert run(folder, tmp_path / "out", *more, "--shard-index", index, "--num-shards", 2) == 0
    captions = sorted(captions_of(ShardedSource(tmp_path / "out", LATENTS)))
    store = TextStore(tmp_path / "out" / "text")
    assert store([*captions, "worst quality", ""]).shape == (5, 9, wan_folder.TEXT_DIM)
