"""Prepared clips: windows hold what the clips show, splits share no frame, bad input leaves nothing behind."""

import json
import pickle

import numpy as np
import pytest

from greedy_distill_jax import cli, prepare
from greedy_distill_jax.codecs.patch import PatchCodec
from greedy_distill_jax.data.sources import clips
from greedy_distill_jax.data.sources.clips import ClipWindows, decode_record, encode_record, fit_frame
from greedy_distill_jax.data.video_io import VideoWriter


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
    assert names == shards | {"dataset.json", "codec.npz"}
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
    for split in clips.SPLITS:
        source = ClipWindows(prepared, split)
        assert len(source) == info["counts"][split] and (source.height, source.width, source.frames) == (12, 16, 8)
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
    source = ClipWindows(prepared)
    again = pickle.loads(pickle.dumps(source))
    np.testing.assert_array_equal(source[3]["video"], again[3]["video"])
    for index in (-1, len(source)):
        with pytest.raises(IndexError):
            source[index]


def test_codec_fits_the_windows(prepared):
    video, codec = ClipWindows(prepared)[2]["video"], PatchCodec.load(prepared / "codec.npz")
    assert np.abs(codec.decode(codec.encode(video)).astype(int) - video).mean() < 3


def test_many_shards_read_as_one(folder, prepared, monkeypatch):
    monkeypatch.setattr(clips, "_SHARD_BYTES", 3 * 8 * 12 * 16 * 3)
    output = folder / "sharded"
    assert _run(folder, output, "--size", "16x12", "--frames", "8", "--stride", "4") == 0
    assert len(list(output.glob("train-*-of-00007.array_record"))) == 7
    one, many = ClipWindows(prepared), ClipWindows(output)
    assert len(one) == len(many)
    for index in range(len(one)):
        np.testing.assert_array_equal(one[index]["video"], many[index]["video"])


def test_resampling_and_no_held_out(folder):
    output = folder / "slow"
    assert _run(folder, output, "--size", "16x12", "--frames", "8", "--fps", "5", "--held-out", "0") == 0
    source = ClipWindows(output)
    assert source.fps == 5 and len(ClipWindows(output, "held_out")) == 0
    np.testing.assert_array_equal(_frame_numbers(source[0]["video"]), 2 * np.arange(8))


def test_overwrite_replaces_prepared_folders_only(folder, prepared, capsys):
    output = folder / "again"
    output.mkdir()  # an empty folder is fine
    run = ["--size", "16x12", "--frames", "8"]
    assert _run(folder, output, *run) == 0
    assert _run(folder, output, *run) == 2 and "--overwrite" in capsys.readouterr().err
    assert _run(folder, output, "--size", "8x8", "--frames", "4", "--overwrite") == 0
    assert ClipWindows(output).width == 8
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
        ("clip,caption\na.mp4\n", "line 2: 'a.mp4' has no caption"),
        ("clip,caption\na.mp4,\xff\n", "cannot be read"),
    ],
)
def test_bad_captions_stop_before_decoding(folder, tmp_path, capsys, monkeypatch, text, message):
    monkeypatch.setattr(clips, "read_frames", lambda *_, **__: pytest.fail("decoded a clip"))
    (tmp_path / "captions.csv").write_bytes(text.encode("latin-1"))
    assert _run(folder, tmp_path / "out", captions=tmp_path / "captions.csv") == 2
    assert message in _one_line(capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["captions.csv"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--size", "32"], "'32' is not WIDTHxHEIGHT"),
        (["--size", "30x32"], "multiples of 4"),
        (["--frames", "0"], "--frames 0"),
        (["--stride", "0"], "--stride 0"),
        (["--fps", "-1"], "--fps -1"),
        (["--held-out", "1"], "--held-out 1"),
        (["--frames", "70"], "none of the 4 clips"),
        (["--frames", "40"], "use fewer --frames, or --held-out 0"),
        (["--clips", "/nonexistent"], "/nonexistent is not a folder"),
        (["--captions", "/nonexistent"], "/nonexistent cannot be read"),
    ],
)
def test_bad_arguments(folder, tmp_path, capsys, arguments, message):
    assert _run(folder, tmp_path / "out", *arguments) == 2
    assert message in _one_line(capsys)
    assert not list(tmp_path.iterdir())


def test_nothing_decodes_or_nothing_to_write(folder, tmp_path, capsys):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/x.mp4").write_bytes(b"no video")
    (tmp_path / "captions.csv").write_text("clip,caption\nx.mp4,x\n")
    assert _run(tmp_path, tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert "skipped x.mp4" in error and "none of the 1 clips gives a window" in error
    assert _run(folder, tmp_path / "captions.csv" / "out") == 2 and "writable" in _one_line(capsys)
    assert _run(folder, tmp_path / "captions.csv") == 2 and "is a file" in _one_line(capsys)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["captions.csv", "in"]


def test_interruption_leaves_nothing(folder, tmp_path, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(clips.PatchCodec, "fit", interrupted)
    assert _run(folder, tmp_path / "out", "--frames", "8") == 130
    assert not list(tmp_path.iterdir())


def test_records_describe_themselves():
    video = np.random.default_rng(0).integers(0, 256, (3, 4, 8, 3), np.uint8)
    record = encode_record(video, "żółw", clip="a.mp4", start=2)
    decoded = decode_record(record)
    np.testing.assert_array_equal(decoded["video"], video)
    assert decoded["caption"] == "żółw"
    for bad in (b"", record[:-1], record + b"x", b"XXXX" + record[4:], record[:20]):
        with pytest.raises(ValueError):
            decode_record(bad)


def test_damaged_folders_are_named(folder, prepared, tmp_path):
    from greedy_distill_jax.errors import UserError

    for path in prepared.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    with pytest.raises(UserError, match="split='test'"):
        ClipWindows(tmp_path, "test")
    shard = tmp_path / "train-00000-of-00001.array_record"
    data = bytearray(shard.read_bytes())
    written = np.flatnonzero(np.frombuffer(data, np.uint8))
    middle = int(written[len(written) // 2])
    data[middle : middle + 16] = bytes(byte ^ 255 for byte in data[middle : middle + 16])
    shard.write_bytes(data)
    source, bad = ClipWindows(tmp_path), []
    for index in range(len(source)):
        try:
            source[index]
        except UserError as error:
            assert shard.name in str(error) and f"index {index} of train" in str(error)
            bad.append(index)
    assert 1 <= len(bad) < len(source)
    shard.write_bytes(data[: len(data) // 3])
    with pytest.raises(UserError, match=shard.name):
        ClipWindows(tmp_path)
    shard.unlink()
    with pytest.raises(UserError, match=shard.name):
        ClipWindows(tmp_path)
    (tmp_path / "dataset.json").write_text("{}")
    with pytest.raises(UserError, match=r"dataset\.json is not"):
        ClipWindows(tmp_path)
    (tmp_path / "dataset.json").unlink()
    with pytest.raises(UserError, match=r"dataset\.json does not exist"):
        ClipWindows(tmp_path)


@pytest.mark.parametrize("shape", [(40, 80), (80, 40), (8, 12), (33, 47), (16, 16)])
def test_fit_frame_crops_the_centre(shape):
    frame = np.zeros((*shape, 3), np.uint8)
    frame[shape[0] // 2 - 1 : shape[0] // 2 + 1, shape[1] // 2 - 1 : shape[1] // 2 + 1] = 255
    out = fit_frame(frame, 16, 16)
    assert out.shape == (16, 16, 3)
    mass = out[..., 0].astype(float)
    centre = [(mass.sum(1 - axis) * np.arange(16)).sum() / mass.sum() for axis in (0, 1)]
    assert np.abs(np.array(centre) - 7.5).max() < 1


def test_real_clips(tmp_path, real_clips):
    captions = {
        "bikes": "bikes",
        "bigbuckbunny": "a rabbit",
        "carphone_pristine": "a man",
        "carphone_distorted": "noise",
    }
    rows = "".join(f"{name}.mp4,{caption}\n" for name, caption in captions.items())
    (tmp_path / "captions.csv").write_text("clip,caption\n" + rows)
    assert _run(tmp_path, tmp_path / "out", "--size", "32x32", "--frames", "16", source=real_clips) == 0
    train, held_out = ClipWindows(tmp_path / "out"), ClipWindows(tmp_path / "out", "held_out")
    assert len(train) == 60 and len(held_out) == 6
    assert (
        {train[i]["caption"] for i in range(60)} == {held_out[i]["caption"] for i in range(6)} == set(captions.values())
    )
    codec = PatchCodec.load(tmp_path / "out/codec.npz")
    video = np.stack([held_out[i]["video"] for i in range(6)])
    error = (codec.decode(codec.encode(video)).astype(float) - video) ** 2
    assert 10 * np.log10(255**2 / error.mean()) > 25
