"""Video files: what is written is read back, resampling follows the clock, nothing half-written stays."""

import io
import struct

import numpy as np
import pytest
from PIL import Image

from greedy_distill_jax.data import video_io
from greedy_distill_jax.data.sources.moving_shapes import MovingShapes
from greedy_distill_jax.data.video_io import VideoWriter, encode_gif, probe, read_frames
from greedy_distill_jax.errors import UserError


@pytest.fixture(scope="module")
def video():
    return MovingShapes(frames=20)[3]["video"]


def _write(path, video, **options):
    with VideoWriter(path, **options) as writer:
        for frame in video:
            writer.write(frame)
    return path


@pytest.mark.parametrize("suffix", [".mp4", ".webm", ".gif"])
def test_round_trip(tmp_path, video, suffix):
    path = _write(tmp_path / f"new/folder/out{suffix}", video, fps=10, upscale=4)
    info = probe(path)
    assert (info.width, info.height, info.fps) == (64, 64, 10)
    frames = np.stack(list(read_frames(path)))
    assert frames.shape == (20, 64, 64, 3) and frames.dtype == np.uint8
    assert np.abs(frames.astype(int) - video.repeat(4, 1).repeat(4, 2)).mean() < 4
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_odd_sizes_gain_a_row_or_column(tmp_path, video):
    frames = np.stack(list(read_frames(_write(tmp_path / "odd.mp4", video[:, :15, :13]))))
    assert frames.shape == (20, 16, 14, 3)
    assert np.abs(frames[:, :15, :13].astype(int) - video[:, :15, :13]).mean() < 8


def test_encoder_without_x264(tmp_path, video, monkeypatch):
    monkeypatch.setattr(video_io.av, "codecs_available", video_io.av.codecs_available - {"libx264"})
    assert len(list(read_frames(_write(tmp_path / "out.mp4", video, upscale=4)))) == 20


def test_resampling_shows_the_frame_of_that_time(tmp_path):
    grey = np.broadcast_to(np.arange(20, 220, 10, np.uint8)[:, None, None, None], (20, 16, 16, 3))
    path = _write(tmp_path / "grey.mp4", grey, fps=10)

    def shown(fps):
        return [round((frame.mean() - 20) / 10) for frame in read_frames(path, fps=fps)]

    assert shown(None) == shown(10) == list(range(20))
    assert shown(5) == list(range(0, 20, 2))
    assert shown(20) == [k // 2 for k in range(40)]
    assert shown(4) == [int(k * 2.5) for k in range(8)]
    with pytest.raises(UserError, match="fps=0"):
        read_frames(path, fps=0)


def test_rotated_clips_come_upright(tmp_path):
    frame = np.zeros((32, 48, 3), np.uint8)
    frame[:8] = 250  # a bright top
    path = _write(tmp_path / "phone.mp4", [frame] * 3)
    data = bytearray(path.read_bytes())
    matrix = data.index(b"tkhd") + 44  # as phones write it: the display matrix says a quarter turn clockwise
    data[matrix : matrix + 36] = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    upright = next(read_frames(path))
    assert upright.shape == (48, 32, 3)
    assert upright[:, -6:].mean() > 200 and upright[:, :20].mean() < 20  # the top has become the right side


def test_files_that_do_not_decode_are_named(tmp_path, video):
    whole = _write(tmp_path / "whole.mp4", video, upscale=8).read_bytes()
    cases = {"noise.mp4": np.random.default_rng(0).bytes(4000), "empty.webm": b"", "text.mp4": b"hello"}
    cases["cut.mp4"] = whole[: len(whole) // 2]
    for name, data in cases.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError, match=name):
            list(read_frames(tmp_path / name))
        with pytest.raises(UserError, match=name):
            probe(tmp_path / name)
    with pytest.raises(UserError, match=r"none.mp4 does not exist"):
        list(read_frames(tmp_path / "none.mp4"))


def test_nothing_stays_after_an_error(tmp_path, video):
    for suffix in (".mp4", ".gif"):
        with pytest.raises(RuntimeError), VideoWriter(tmp_path / f"out{suffix}") as writer:
            writer.write(video[0])
            raise RuntimeError
    with pytest.raises(ValueError, match="frame 1 has shape"), VideoWriter(tmp_path / "out.mp4") as writer:
        writer.write(video[0])
        writer.write(video[0, :8])
    with pytest.raises(UserError, match="no frame"), VideoWriter(tmp_path / "out.mp4"):
        pass
    assert not list(tmp_path.iterdir())


def test_error_keeps_the_file_of_before(tmp_path, video):
    path = _write(tmp_path / "out.mp4", video)
    before = path.read_bytes()
    with pytest.raises(RuntimeError), VideoWriter(path) as writer:
        writer.write(video[0])
        raise RuntimeError
    assert path.read_bytes() == before


def test_bad_targets(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"'\.foo' is unknown"):
        VideoWriter(tmp_path / "out.foo")
    with pytest.raises(UserError, match=r"file/out\.mp4 .*writable"):
        VideoWriter(tmp_path / "file" / "out.mp4")
    (tmp_path / "dir.mp4").mkdir()
    with pytest.raises(UserError, match="folder"):
        VideoWriter(tmp_path / "dir.mp4")
    with pytest.raises(UserError, match="fps=0"):
        VideoWriter(tmp_path / "out.mp4", fps=0)
    with pytest.raises(UserError, match=r"upscale=0"):
        VideoWriter(tmp_path / "out.mp4", upscale=0)


def test_encode_gif(video):
    image = Image.open(io.BytesIO(encode_gif(video, fps=8, upscale=2)))
    assert (image.format, image.size, image.n_frames, image.info["loop"]) == ("GIF", (32, 32), 20, 0)
    np.testing.assert_array_equal(np.asarray(image.convert("RGB"))[::2, ::2], video[0])
