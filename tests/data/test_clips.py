"""Prepared clips: windows hold what the clips show, splits share no frame, bad input leaves nothing behind."""

import argparse
import json
import pickle

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from greedy_distill_jax import cli, prepare
from greedy_distill_jax.codecs.patch import PatchCodec
from greedy_distill_jax.data.sources import clips, cutting, windows
from greedy_distill_jax.data.sources.clips import CLIPS
from greedy_distill_jax.data.sources.cutting import SPLITS, fit_frame
from greedy_distill_jax.data.sources.protocol import captions_of
from greedy_distill_jax.data.sources.registry import load_source
from greedy_distill_jax.data.video_io import VideoWriter
from greedy_distill_jax.errors import UserError
from greedy_distill_jax.storage.sharded import ShardedSource
from tests.data.test_video_io import encode


def _write_clip(path, frames, fps=10, size=(48, 64)):
    """A clip whose frame t has grey level 3 t + 20, with a little texture."""
    texture = np.indices(size).sum(0)[..., None] % 16
    with VideoWriter(path, fps=fps) as writer:
        for t in range(frames):
            writer.write(np.broadcast_to(3 * t + 20 + texture, (*size, 3)).astype(np.uint8))


def _frame_numbers(video):
    return np.rint((video.mean((1, 2, 3)) - 27.5) / 3).astype(int)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("clips")
    (root / "in").mkdir()
    _write_clip(root / "in/a.mp4", 60)
    _write_clip(root / "in/b.webm", 40, size=(64, 48))
    _write_clip(root / "in/c.mp4", 10)
    (root / "in/notes.txt").write_text("not a clip")
    (root / "in/broken.mp4").write_bytes(np.random.default_rng(0).bytes(3000))
    (root / "captions.csv").write_text('clip,caption\na.mp4,"grey, rising"\nb.webm,b\nc.mp4,c\nbroken.mp4,d\n')
    return root


def _run(folder, output, *more, captions="captions.csv", source="in"):
    arguments = ["--clips", folder / source, "--captions", folder / captions, "--output", output]
    with pytest.raises(SystemExit) as end:
        cli.run(prepare.main, ["clips", *map(str, arguments), *more])
    return end.value.code


@pytest.fixture(scope="module")
def prepared(folder):
    output = folder / "out"
    assert _run(folder, output, "--size", "16x12", "--frames", "8", "--stride", "4") == 0
    return output


def test_folder_is_complete(prepared, folder):
    names = {path.name for path in prepared.iterdir()}
    shards = {f"{split}-00000-of-00001.array_record" for split in ("train", "held_out")}
    assert names == shards | {"dataset.json", "codec.npz", "plan.json", "parts"}
    info = json.loads((prepared / "dataset.json").read_text())
    assert (info["width"], info["height"], info["frames"], info["fps"]) == (16, 12, 8, 10)
    assert info["captions"] == {"a.mp4": "grey, rising", "b.webm": "b", "c.mp4": "c"}
    assert [(c["clip"], c["width"], c["height"], c["frames"]) for c in info["clips"]][:2] == [
        ("a.mp4", 64, 48, 60),
        ("b.webm", 48, 64, 40),
    ]
    assert [s["clip"] for s in info["skipped"]] == ["broken.mp4"] and "broken.mp4" in info["skipped"][0]["reason"]
    assert not list(folder.glob(".*"))


def test_windows_show_their_part_of_the_clip(prepared):
    info = json.loads((prepared / "dataset.json").read_text())
    seen = {}
    for split in SPLITS:
        source = ShardedSource(prepared, CLIPS, split)
        assert len(source) == info["counts"][split] and source.captions == {"grey, rising", "b", "c"}
        for index in range(len(source)):
            example = source[index]
            assert example["video"].shape == (8, 12, 16, 3) and example["video"].dtype == np.uint8
            numbers = _frame_numbers(example["video"])
            np.testing.assert_array_equal(numbers, numbers[0] + np.arange(8))
            seen.setdefault((example["caption"], split), []).append(numbers[0])
    # 60 frames: the last 15% are 9, so training ends at 51; 40 frames: at least a window, at 32; 10 frames: none
    assert seen["grey, rising", "train"] == list(range(0, 44, 4)) and seen["grey, rising", "held_out"] == [51]
    assert seen["b", "train"] == list(range(0, 25, 4)) and seen["b", "held_out"] == [32]
    assert seen["c", "train"] == [0] and ("c", "held_out") not in seen


def test_source_is_picklable_and_checks_its_index(prepared):
    source = ShardedSource(prepared, CLIPS)
    again = pickle.loads(pickle.dumps(source))
    np.testing.assert_array_equal(source[3]["video"], again[3]["video"])
    for index in (-1, len(source)):
        with pytest.raises(IndexError):
            source[index]


def test_codec_fits_the_windows(prepared):
    video, codec = ShardedSource(prepared, CLIPS)[2]["video"], PatchCodec.load(prepared / "codec.npz")
    assert np.abs(codec.decode(codec.encode(video)).astype(int) - video).mean() < 3


OPTIONS = ("--size", "16x12", "--frames", "8", "--stride", "4", "--group", "1")


def _assert_same(output, prepared):
    """The same windows in the same order, and so the same codec."""
    for split in SPLITS:
        one, other = ShardedSource(prepared, CLIPS, split), ShardedSource(output, CLIPS, split)
        assert len(one) == len(other)
        for index in range(len(one)):
            assert one[index]["caption"] == other[index]["caption"]
            np.testing.assert_array_equal(one[index]["video"], other[index]["video"])
    a, b = (PatchCodec.load(path / "codec.npz") for path in (prepared, output))
    np.testing.assert_array_equal(a.components, b.components)
    assert a.scale == b.scale


def test_many_shards_read_as_one(folder, prepared):
    output = folder / "sharded"
    assert _run(folder, output, *OPTIONS) == 0
    assert len(list(output.glob("train-*-of-00004.array_record"))) == 3  # of four clips one is broken
    _assert_same(output, prepared)


def test_a_killed_job_goes_on_without_gap_or_repeat(folder, prepared, tmp_path, monkeypatch):
    output, written = tmp_path / "out", []
    real = windows.encode_record

    def until_the_last(arrays, **header):
        written.append(header["clip"])
        if header["clip"] == "c.mp4":
            raise KeyboardInterrupt
        return real(arrays, **header)

    with monkeypatch.context() as patch:
        patch.setattr(windows, "encode_record", until_the_last)
        assert _run(folder, output, *OPTIONS) == 130
    assert not (output / "dataset.json").exists() and not list(output.glob(".*"))
    with pytest.raises(UserError, match="is not finished: run the same command again"):
        ShardedSource(output, CLIPS)
    again = []
    monkeypatch.setattr(windows, "encode_record", lambda *a, **k: again.append(k["clip"]) or real(*a, **k))
    assert _run(folder, output, *OPTIONS) == 0
    assert set(again) == {"c.mp4"} and {"a.mp4", "b.webm"} < set(written)
    _assert_same(output, prepared)


def test_processes_share_the_clips(folder, prepared, tmp_path, capsys):
    for index in (2, 0, 1):
        assert _run(folder, tmp_path / "out", *OPTIONS, "--shard-index", str(index), "--num-shards", "3") == 0
    assert capsys.readouterr().out.count("finished when the others are") == 2
    _assert_same(tmp_path / "out", prepared)


def test_resampling_and_no_held_out(folder):
    output = folder / "slow"
    assert _run(folder, output, "--size", "16x12", "--frames", "8", "--fps", "5", "--held-out", "0") == 0
    source = ShardedSource(output, CLIPS)
    assert source.info["fps"] == 5 and len(ShardedSource(output, CLIPS, "held_out")) == 0
    np.testing.assert_array_equal(_frame_numbers(source[0]["video"]), 2 * np.arange(8))


def test_one_constant_rate_or_one_that_is_given(tmp_path, capsys):
    """Rates less than 1% apart, such as 29.97 and 30, are one."""
    source, run = tmp_path / "in", [tmp_path, tmp_path / "out", "--size", "8x8", "--frames", "4"]
    source.mkdir()
    _write_clip(source / "a.mp4", 8, fps=30)
    _write_clip(source / "b.mp4", 8, fps=29.97)
    (tmp_path / "captions.csv").write_text("clip,caption\na.mp4,a\nb.mp4,b\n")
    assert _run(*run, "--group", "1") == 0
    (tmp_path / "captions.csv").write_text("clip,caption\na.mp4,a\nb.mp4,b\nc.mp4,c\n")
    grey = [np.full((48, 64, 3), 100, np.uint8)] * 8
    encode(source / "c.mp4", grey, rate=30, times=[0, 1, 2, 3, 4, 8, 12, 16])
    run[1] = tmp_path / "out2"
    assert _run(*run) == 2
    told = _one_line(capsys)
    assert told.startswith("error: --fps: c.mp4 has a variable frame rate") and told.endswith("such as 29.97")
    assert not run[1].exists()
    assert _run(*run, "--fps", "29.97") == 0
    info = json.loads((run[1] / "dataset.json").read_text())
    assert [(clip["fps"], clip["frames"]) for clip in info["clips"]] == [(29.97, 8), (29.97, 8), (29.97, 17)]


def test_clips_are_listed_as_they_are_shown(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    picture = np.random.default_rng(0).integers(0, 255, (32, 48, 4), np.uint8)
    quarter = [0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30]
    encode(tmp_path / "in/a.mov", [picture] * 4, codec="qtrle", layout="argb", matrix=quarter)
    encode(tmp_path / "in/hdr.mp4", [picture] * 4, color_trc=18)
    (tmp_path / "captions.csv").write_text("clip;caption\na.mov;a, b\nhdr.mp4;c\n")
    assert _run(tmp_path, tmp_path / "out", "--size", "8x12", "--frames", "4", "--held-out", "0") == 0
    info, told = json.loads((tmp_path / "out/dataset.json").read_text()), capsys.readouterr()
    (clip,) = info["clips"]
    assert (clip["width"], clip["height"], clip["alpha"]) == (32, 48, True) and info["captions"] == {"a.mov": "a, b"}
    assert "put on black: 1\n" in told.out and "fields are separated by ';'" in told.err
    assert "skipped hdr.mp4: " in told.err and "HLG" in info["skipped"][0]["reason"]


def test_overwrite_replaces_prepared_folders_only(folder, prepared, capsys):
    output = folder / "again"
    output.mkdir()  # an empty folder is fine
    run = ["--size", "16x12", "--frames", "8"]
    assert _run(folder, output, *run) == 0
    before = (output / "dataset.json").read_text()
    assert _run(folder, output, *run) == 0 and (output / "dataset.json").read_text() == before  # nothing left to do
    assert _run(folder, output, "--size", "8x8", "--frames", "4") == 2
    error = capsys.readouterr().err
    assert f"error: --output: {output} was begun with frames = 8, not 4" in error and "or overwrite this one" in error
    assert _run(folder, output, "--size", "8x8", "--frames", "4", "--overwrite") == 0
    assert ShardedSource(output, CLIPS)[0]["video"].shape == (4, 8, 8, 3)
    assert _run(folder, folder / "in", *run, "--overwrite") == 2  # the clips themselves
    assert (folder / "in/a.mp4").exists() and not list(folder.glob(".*"))


def _one_line(capsys):
    lines = capsys.readouterr().err.strip().splitlines()
    assert sum(line.startswith("error: ") for line in lines) == 1 and "Traceback" not in "".join(lines)
    return lines[-1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("clip,text\na.mp4,x\n", "no column 'caption'"),
        ("", "no column 'clip'"),
        ("clip,caption\na.mp4,x\nb.webm,x\nc.mp4,x\nbroken.mp4,x\nz.mp4,x\n", "names 'z.mp4', which is not in"),
        ("clip,caption\na.mp4,x\n", "no caption for 'b.webm', 'broken.mp4', 'c.mp4'"),
        ("clip,caption\na.mp4,x\na.mp4,y\n", "line 3: 'a.mp4' is named twice"),
        ("clip,caption\na.mp4,\n", "line 2: 'a.mp4' has no caption"),
        ("clip,caption\na.mp4,\xff\n", "cannot be read"),
    ],
)
def test_bad_captions_stop_before_decoding(folder, tmp_path, capsys, monkeypatch, text, message):
    monkeypatch.setattr(cutting, "read_frames", lambda *_, **__: pytest.fail("decoded a clip"))
    (tmp_path / "captions.csv").write_bytes(text.encode("latin-1"))
    assert _run(folder, tmp_path / "out", captions=tmp_path / "captions.csv") == 2
    line = _one_line(capsys)
    assert message in line and line.startswith("error: --captions: ")
    assert [path.name for path in tmp_path.iterdir()] == ["captions.csv"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--size", "32"], "--size: '32' is not WIDTHxHEIGHT"),
        (["--size", "30x32"], "--size: width=30: both sides must be multiples of 4"),
        (["--frames", "0"], "--frames: it is 0; it must be at least 1"),
        (["--stride", "0"], "--stride: it is 0; it must be at least 1"),
        (["--crops", "-1"], "--crops: it is -1; it must be at least 0"),
        (["--fps", "-1"], "--fps: it is -1; it must be from 0.1 to 240"),
        (["--fps", "inf"], "--fps: it is inf"),
        (["--fps", "1e9"], "--fps: it is 1e9; it must be from 0.1 to 240"),
        (["--fps", "1e-9"], "--fps: it is 1e-9; it must be from 0.1 to 240"),
        (["--held-out", "1"], "--held-out: it is 1; it must be from 0 to below 1"),
        (["--clips", "/nonexistent"], "--clips: /nonexistent is not a folder"),
        (["--captions", "/nonexistent"], "--captions: /nonexistent cannot be read"),
        (["--group", "0"], "--group: it is 0; it must be at least 1"),
        (["--shard-index", "1"], "--shard-index and --num-shards belong together"),
    ],
)
def test_bad_arguments_leave_nothing(folder, tmp_path, capsys, arguments, message):
    assert _run(folder, tmp_path / "out", *arguments) == 2
    assert f"error: {message}" in _one_line(capsys)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments, message, left",
    [
        (["--frames", "70"], "--clips: {}: none of the 4 clips gives a window", "holds no clips"),
        (["--frames", "40"], "--held-out: held_out=0.15: no clip has the 80 frames", "is not finished"),
    ],
)
def test_clips_that_are_too_short_leave_no_finished_folder(folder, tmp_path, capsys, arguments, message, left):
    assert _run(folder, tmp_path / "out", *arguments) == 2
    assert f"error: {message.format(folder / 'in')}" in _one_line(capsys)
    with pytest.raises(UserError, match=left):
        ShardedSource(tmp_path / "out", CLIPS)
    assert (tmp_path / "out").exists() == (left == "is not finished")  # without one window nothing stays


@pytest.mark.parametrize("name", ["frames", "height", "width"])
def test_a_description_that_lacks_a_size_is_no_description(prepared, tmp_path, name):
    info = json.loads((prepared / "dataset.json").read_text())
    del info[name]
    (tmp_path / "dataset.json").write_text(json.dumps(info))
    with pytest.raises(UserError, match=f"dataset.json does not describe clips .it does not tell {name}"):
        load_source(f"clips:{tmp_path}")


def test_nothing_decodes_or_nothing_to_write(folder, tmp_path, capsys):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/x.mp4").write_bytes(b"no video")
    (tmp_path / "captions.csv").write_text("clip,caption\nx.mp4,x\n")
    assert _run(tmp_path, tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert "skipped x.mp4" in error and "none of the 1 clips gives a window" in error
    (tmp_path / "in/x.mp4").unlink()
    (tmp_path / "in/x.mp4").symlink_to(tmp_path / "nowhere")
    assert _run(tmp_path, tmp_path / "out") == 2 and "skipped x.mp4" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()  # mended clips are another job: nothing may be in its way
    assert _run(folder, tmp_path / "captions.csv" / "out") == 2 and "cannot be written" in _one_line(capsys)
    assert _run(folder, tmp_path / "captions.csv") == 2 and "is a file" in _one_line(capsys)


def test_an_interruption_while_the_codec_is_fitted(folder, prepared, tmp_path, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(clips.PatchCodec, "fit", interrupted)
        assert _run(folder, tmp_path / "out", *OPTIONS) == 130
    assert not (tmp_path / "out" / "dataset.json").exists()
    assert _run(folder, tmp_path / "out", *OPTIONS) == 0
    _assert_same(tmp_path / "out", prepared)


def test_folders_of_earlier_versions_are_read(prepared, tmp_path, folder, capsys):
    """They have no kind, no plan and records that hold nothing but a video."""
    info, counts = json.loads((prepared / "dataset.json").read_text()), {}
    shards = {}
    for split in SPLITS:
        source, file = ShardedSource(prepared, CLIPS, split), f"{split}-00000-of-00001.array_record"
        writer = ArrayRecordWriter(str(tmp_path / file), "group_size:1,zstd:3")
        for index in range(len(source)):
            video, caption = source[index]["video"], source[index]["caption"]
            header = json.dumps({"shape": video.shape, "caption": caption, "clip": "x", "start": 0}).encode()
            writer.write(b"GDJ1" + len(header).to_bytes(4, "little") + header + video.tobytes())
        writer.close()
        shards[split], counts[split] = [{"file": file, "records": len(source)}], len(source)
    del info["kind"]
    (tmp_path / "dataset.json").write_text(json.dumps({**info, "shards": shards, "counts": counts}))
    (tmp_path / "codec.npz").write_bytes((prepared / "codec.npz").read_bytes())
    _assert_same(tmp_path, prepared)
    source, codec = load_source(f"clips:{tmp_path}", size=None, frames=8)
    assert isinstance(codec, PatchCodec) and captions_of(source) == {"grey, rising", "b", "c"}
    with pytest.raises(UserError, match="holds frames=8, asked for 16; .* prepare the clips again"):
        load_source(f"clips:{tmp_path}", frames=16)
    with pytest.raises(UserError, match="holds size=12x16, asked for 32"):
        load_source(f"clips:{tmp_path}", size=32)
    assert _run(folder, tmp_path, *OPTIONS) == 2
    assert "holds clips of an earlier version, which no job can go on with" in _one_line(capsys)
    assert _run(folder, tmp_path, *OPTIONS, "--overwrite") == 0
    _assert_same(tmp_path, prepared)


def test_damaged_folders_are_named(folder, prepared, tmp_path):
    for path in (path for path in prepared.iterdir() if path.is_file()):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    with pytest.raises(UserError, match="split='test'"):
        ShardedSource(tmp_path, CLIPS, "test")
    shard = tmp_path / "train-00000-of-00001.array_record"
    data = bytearray(shard.read_bytes())
    written = np.flatnonzero(np.frombuffer(data, np.uint8))
    middle = int(written[len(written) // 2])
    data[middle : middle + 16] = bytes(byte ^ 255 for byte in data[middle : middle + 16])
    shard.write_bytes(data)
    source, bad = ShardedSource(tmp_path, CLIPS), []
    for index in range(len(source)):
        try:
            source[index]
        except UserError as error:
            assert shard.name in str(error) and f"index {index} of train" in str(error)
            bad.append(index)
    assert 1 <= len(bad) < len(source)
    shard.write_bytes(data[: len(data) // 3])
    with pytest.raises(UserError, match=rf"{shard.name} cannot be read \(it has \d+ bytes instead of {len(data)}\)"):
        ShardedSource(tmp_path, CLIPS)
    shard.unlink()
    with pytest.raises(UserError, match=shard.name):
        ShardedSource(tmp_path, CLIPS)
    (tmp_path / "dataset.json").write_text("{}")
    with pytest.raises(UserError, match=r"dataset\.json does not describe clips"):
        ShardedSource(tmp_path, CLIPS)
    (tmp_path / "dataset.json").unlink()
    with pytest.raises(UserError, match="is not finished"):
        ShardedSource(tmp_path, CLIPS)


@pytest.mark.parametrize(
    "fps, rates, told", [(None, [25, 29.97], "25, 29.97 fps"), (None, [29.97, 30], ""), (8.0, [25, 30], "")]
)
def test_mixed_rates_of_an_earlier_version_are_told(capsys, fps, rates, told):
    info = {"clips": [{"fps": rate} for rate in rates], "skipped": [], "counts": {"train": 2}}
    prepare._tell_windows(argparse.Namespace(fps=fps, output="out"), info, "small")
    assert (f"note: clips of different rates ({told})" in (out := capsys.readouterr().out)) == bool(told), out
    assert "note" not in out or told


@pytest.mark.parametrize("shape", [(40, 80), (80, 40), (8, 12), (33, 47), (16, 16)])
def test_fit_frame_crops_the_centre(shape):
    frame = np.zeros((*shape, 3), np.uint8)
    frame[shape[0] // 2 - 1 : shape[0] // 2 + 1, shape[1] // 2 - 1 : shape[1] // 2 + 1] = 255
    out = fit_frame(frame, 16, 16)
    assert out.shape == (16, 16, 3)
    mass = out[..., 0].astype(float)
    centre = [(mass.sum(1 - axis) * np.arange(16)).sum() / mass.sum() for axis in (0, 1)]
    assert np.abs(np.array(centre) - 7.5).max() < 1


def test_real_clips(tmp_path, real_clips, capsys):
    captions = {
        "bikes": "bikes",
        "bigbuckbunny": "a rabbit",
        "carphone_pristine": "a man",
        "carphone_distorted": "noise",
    }
    rows = "".join(f"{name}.mp4,{caption}\n" for name, caption in captions.items())
    (tmp_path / "captions.csv").write_text("clip,caption\n" + rows)
    run = [tmp_path, tmp_path / "out", "--size", "32x32", "--frames", "16"]
    assert _run(*run, source=real_clips) == 2  # two rates
    assert "bigbuckbunny.mp4 25, carphone_distorted.mp4 29.97" in (told := _one_line(capsys)), told
    assert told.startswith("error: --fps: ") and told.endswith("such as 25") and not (tmp_path / "out").exists()
    assert _run(*run, "--fps", "25", source=real_clips) == 0
    train, held_out = ShardedSource(tmp_path / "out", CLIPS), ShardedSource(tmp_path / "out", CLIPS, "held_out")
    assert len(train) == 56 and len(held_out) == 6
    assert (
        {train[i]["caption"] for i in range(56)} == {held_out[i]["caption"] for i in range(6)} == set(captions.values())
    )
    codec = PatchCodec.load(tmp_path / "out/codec.npz")
    video = np.stack([held_out[i]["video"] for i in range(6)])
    error = (codec.decode(codec.encode(video)).astype(float) - video) ** 2
    assert 10 * np.log10(255**2 / error.mean()) > 25
