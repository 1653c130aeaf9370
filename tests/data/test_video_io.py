"""Video files: what is written is read back, resampling follows the clock, nothing half-written stays."""

import io
import re
from fractions import Fraction

import av
import numpy as np
import pytest
from av.video.reformatter import ColorRange, Colorspace
from hypothesis import given, settings, strategies as st
from PIL import Image

from greedy_distill_jax.data import video_io
from greedy_distill_jax.data.display import upright
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


def encode(path, frames, *, codec="libx264", layout="yuv420p", rate=25, options=(), movflags=None, **more):
    """A file as other programs write it; ``more`` are times, a display matrix and what the codec is told of colours."""
    times, matrix, colours = more.pop("times", None), more.pop("matrix", None), more.pop("matrix_of_colours", None)
    with av.open(str(path), "w", container_options={"movflags": movflags} if movflags else {}) as container:
        stream = container.add_stream(codec, rate=rate, options=dict(options))
        stream.height, stream.width, stream.pix_fmt = *frames[0].shape[:2], layout
        if matrix:
            stream.set_display_matrix(matrix)
        for name, value in more.items():
            setattr(stream.codec_context, name, value)
        for index, frame in enumerate(frames):
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24" if frame.shape[2] == 3 else "rgba")
            if colours:
                picture = picture.reformat(format=layout, dst_colorspace=colours)
            picture.pts, picture.time_base = times[index] if times else index, Fraction(1, rate)
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("video")


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
    for fps in (0, -1, 1e-9, 1e9, float("inf"), float("nan")):
        with pytest.raises(UserError, match=re.escape(f"fps={fps:g} is no rate; use 0.1 to 240")) as error:
            read_frames(path, fps=fps)
        assert error.value.field == "fps"


@pytest.mark.parametrize("name, rate", [("out.mp4", 30), ("out.webm", 30), ("out.mkv", 24), ("out.avi", 25)])
def test_resampling_to_the_own_rate_changes_nothing(tmp_path, name, rate):
    """webm and mkv round times to milliseconds: 67 is 2 / 30 s."""
    codec = {".webm": "libvpx", ".avi": "mpeg4"}.get(name[3:], "libx264")
    grey = [np.full((16, 16, 3), 20 + 10 * index, np.uint8) for index in range(20)]
    path = encode(tmp_path / name, grey, codec=codec, rate=rate)
    assert [round((frame.mean() - 20) / 10) for frame in read_frames(path, fps=rate)] == list(range(20))
    info = probe(path)
    assert (info.fps, info.frames, info.variable) == (rate, 20, False)


def test_uneven_times_are_told(tmp_path):
    frames = [np.full((16, 16, 3), 20 + 10 * index, np.uint8) for index in range(20)]
    path = encode(tmp_path / "phone.mp4", frames, rate=30, times=[*range(10), *range(10, 30, 2)])
    info = probe(path)
    assert info.variable and info.frames == 20 and round(info.fps, 1) == round(30 * 19 / 28, 1)
    shown = [round((frame.mean() - 20) / 10) for frame in read_frames(path, fps=30)]
    assert shown[:28] == [*range(10), *(index for index in range(10, 19) for _ in range(2))]


QUADRANTS = np.kron([[60, 120], [180, 240]], np.ones((16, 24)))[..., None].repeat(3, 2).astype(np.uint8)


def _shown(image, a, b, c, d):
    """Moves every pixel to where the matrix says."""
    rows, columns = np.indices(image.shape[:2])
    x, y = a * columns + c * rows, b * columns + d * rows
    x, y = x - x.min(), y - y.min()
    out = np.zeros((y.max() + 1, x.max() + 1, 3), image.dtype)
    out[y, x] = image
    return out


@given(turn=st.integers(0, 3), mirrored=st.booleans(), suffix=st.sampled_from([".mp4", ".mov", ".mkv"]))
@settings(max_examples=24)
def test_turned_and_mirrored_clips_come_upright(folder, turn, mirrored, suffix):
    a, b, c, d = [(1, 0, 0, 1), (0, 1, -1, 0), (-1, 0, 0, -1), (0, -1, 1, 0)][turn]
    a, b = (-a, -b) if mirrored else (a, b)  # the columns run the other way, as in a selfie
    sides = [a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30]
    path = encode(folder / f"phone{suffix}", [QUADRANTS], options={"qp": "0"}, matrix=sides)
    expected, frame, info = _shown(QUADRANTS, a, b, c, d), next(read_frames(path)), probe(path)
    assert frame.shape == expected.shape == (info.height, info.width, 3)
    assert np.abs(frame.astype(int) - expected).max() <= 2


@given(
    entries=st.tuples(st.sampled_from([-1, 1]), st.sampled_from([-1, 1])),
    crossed=st.booleans(),
    scale=st.integers(1 << 12, 1 << 20),
    off=st.integers(-30, 30),
    size=st.tuples(st.integers(1, 4), st.integers(1, 4)),
)
def test_display_matrices_move_every_pixel_where_they_say(entries, crossed, scale, off, size):
    image = np.arange(np.prod(size) * 3, dtype=np.uint8).reshape(*size, 3)
    one, two = entries
    a, b, c, d = (0, one, two, 0) if crossed else (one, 0, 0, two)
    noise = [off if entry == 0 else 0 for entry in (a, b, c, d)]  # what rounding leaves of a zero
    a_, b_, c_, d_ = (scale * entry + more for entry, more in zip((a, b, c, d), noise))
    np.testing.assert_array_equal(upright(image, [a_, b_, 0, c_, d_, 0, 7, 9, 1 << 30], "x"), _shown(image, a, b, c, d))


@pytest.mark.parametrize("entries", [(0, 0, 0, 0), (1, 0, 0, 0), (0.7, 0.7, -0.7, 0.7), (1, 1, 0, 1), (1, 0, 1, 0)])
def test_other_display_matrices_are_refused(entries):
    a, b, c, d = (round(entry * 65536) for entry in entries)
    with pytest.raises(UserError, match=r"x\.mp4 is to be shown by the matrix .*, no quarter turn"):
        upright(QUADRANTS, [a, b, 0, c, d, 0, 0, 0, 1 << 30], "x.mp4")


@pytest.mark.parametrize("aspect, shape", [((4, 3), (32, 64)), ((1, 2), (64, 48)), ((1, 1), (32, 48))])
def test_pixels_become_square(tmp_path, aspect, shape):
    path = encode(tmp_path / "dv.mp4", [QUADRANTS], options={"qp": "0"}, sample_aspect_ratio=Fraction(*aspect))
    frame, info = next(read_frames(path)), probe(path)
    assert frame.shape == (*shape, 3) and (info.height, info.width) == shape
    corners = frame[[2, 2, -3, -3], [2, -3, 2, -3], 0].astype(int)
    assert np.abs(corners - [60, 120, 180, 240]).max() <= 2


@pytest.mark.parametrize(
    "name, codec, layout",
    [("a.mov", "qtrle", "argb"), ("a.webm", "libvpx-vp9", "yuva420p"), ("b.webm", "libvpx", "yuva420p")],
)
def test_transparent_parts_are_black(tmp_path, name, codec, layout):
    picture = np.full((32, 48, 4), 200, np.uint8)
    picture[:16, :, 3], picture[16:, :24, 3], picture[16:, 24:, 3] = 255, 128, 0
    options = {"crf": "4", "b": "2M", "auto-alt-ref": "0"} if name.endswith("webm") else {}
    path = encode(tmp_path / name, [picture] * 2, codec=codec, layout=layout, options=options)
    assert probe(path).alpha
    for frame in read_frames(path):
        corners = frame[[4, 28, 28], [4, 4, -5], 0].astype(int)
        assert np.abs(corners - [200, 100, 0]).max() <= 4


RED = np.full((16, 16, 3), (200, 40, 40), np.uint8)


@pytest.mark.parametrize(
    "matrix, tags, size",
    [
        (Colorspace.ITU709, {"colorspace": 1}, 1),
        (Colorspace.ITU601, {"colorspace": 6}, 1),
        (Colorspace.ITU601, {}, 1),  # without a word small frames are BT.601,
        (Colorspace.ITU709, {}, 40),  # large ones BT.709
    ],
)
def test_colours_are_kept(tmp_path, matrix, tags, size):
    red = RED.repeat(size, 0).repeat(size, 1)
    path = encode(tmp_path / "red.mp4", [red], options={"qp": "0"}, matrix_of_colours=matrix, **tags)
    assert np.abs(next(read_frames(path))[4, 4].astype(int) - (200, 40, 40)).max() <= 3


def test_written_files_say_their_colours(tmp_path, video):
    for suffix in (".mp4", ".webm"):
        with av.open(str(_write(tmp_path / f"out{suffix}", [RED], upscale=2))) as container:
            frame = next(container.decode(video=0))
        assert (frame.colorspace, frame.color_range) == (Colorspace.ITU709, ColorRange.MPEG)


@pytest.mark.parametrize(
    "tags, told",
    [
        ({"color_trc": 16, "color_primaries": 9, "colorspace": 9}, r"PQ \(HDR\)"),
        ({"color_trc": 18, "color_primaries": 9, "colorspace": 9}, r"HLG \(HDR\)"),
        ({"color_trc": 1, "color_primaries": 12, "colorspace": 1}, "Display P3"),
        ({"color_trc": 1, "color_primaries": 1, "colorspace": 8}, "YCgCo"),
    ],
)
def test_colours_that_would_come_out_wrong_are_refused(tmp_path, tags, told):
    path = encode(tmp_path / "hdr.mp4", [RED], **tags)
    for read in (probe, lambda path: list(read_frames(path))):
        with pytest.raises(UserError, match=rf"hdr.mp4 has colours in {told}.*convert it to BT.709"):
            read(path)


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


@pytest.mark.parametrize(
    "name, codec, flags",
    [
        ("first.mp4", "libx264", "faststart"),
        ("first.mov", "libx264", "faststart"),
        ("pieces.mp4", "libx264", "frag_keyframe+empty_moov"),
        ("stream.webm", "libvpx", None),
        ("stream.mkv", "libx264", None),
        ("old.avi", "mpeg4", None),
    ],
)
@pytest.mark.parametrize("part", [0.5, 0.93])
def test_files_that_are_cut_off_are_refused(tmp_path, name, codec, flags, part):
    """Their first frames decode, and FFmpeg says nothing at the end."""
    noise = np.random.default_rng(0).integers(0, 255, (30, 32, 48, 3), np.uint8)
    path = encode(tmp_path / name, noise, codec=codec, options={"g": "10"}, movflags=flags)
    assert len(list(read_frames(path))) == probe(path).frames == 30
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * part)])
    for fps in (None, 10):
        with pytest.raises(UserError, match=f"{name} is cut off"):
            list(read_frames(path, fps=fps))
    with pytest.raises(UserError, match=f"{name} is cut off"):
        probe(path)


def test_frames_that_the_decoder_calls_damaged_are_refused(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (30, 32, 48, 3), np.uint8)
    path = encode(tmp_path / "bad.avi", noise, codec="mpeg4")
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 60] = np.random.default_rng(1).bytes(60)
    path.write_bytes(data)
    with pytest.raises(UserError, match="bad.avi is cut off or damaged near"):
        list(read_frames(path))


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


def test_a_name_that_cannot_be_given_leaves_nothing(tmp_path, video):
    with (
        pytest.raises(UserError, match="cannot write .*out.gif .Is a directory"),
        VideoWriter(tmp_path / "out.gif") as w,
    ):
        w.write(video[0])
        (tmp_path / "out.gif").mkdir()
    assert [p.name for p in tmp_path.iterdir()] == ["out.gif"]


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
    for suffix, most in ((".mp4", 240), (".webm", 240), (".gif", 50)):
        for fps in (0, 1e-9, most + 1, 1e9, float("inf"), float("nan")):
            with pytest.raises(UserError, match=re.escape(f"fps={fps:g} is no rate of a {suffix}; use 0.1 to {most}")):
                VideoWriter(tmp_path / f"out{suffix}", fps=fps)
    with pytest.raises(UserError, match="400000x400000 pixels; enlarge less") as error:
        _write(tmp_path / "out.mp4", [np.zeros((4, 4, 3), np.uint8)], upscale=100_000)
    assert error.value.field == "upscale"
    with pytest.raises(UserError, match=r"upscale=0"):
        VideoWriter(tmp_path / "out.mp4", upscale=0)


@pytest.mark.parametrize(
    "name, encoders", [("a.mp4", set()), ("b.mp4", {"libx264"}), ("a.webm", set()), ("a.gif", set())]
)
@pytest.mark.parametrize("fps", [0.1, 0.123, 23.976, 29.97, 50, 99.999, 240])
def test_rates_are_kept(tmp_path, video, monkeypatch, name, encoders, fps):
    if fps > 50 and name.endswith("gif"):
        fps = 47.5
    monkeypatch.setattr(video_io.av, "codecs_available", video_io.av.codecs_available - encoders)
    info = probe(_write(tmp_path / name, video, fps=fps))
    assert info.frames == 20 and info.fps == pytest.approx(fps, rel=0.02 if name == "a.gif" else 1e-3)


def test_encode_gif(video):
    image = Image.open(io.BytesIO(encode_gif(video, fps=8, upscale=2)))
    assert (image.format, image.size, image.n_frames, image.info["loop"]) == ("GIF", (32, 32), 20, 0)
    np.testing.assert_array_equal(np.asarray(image.convert("RGB"))[::2, ::2], video[0])
