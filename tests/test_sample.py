"""The command sample: every prompt by itself, words without a meaning, switches that contradict each other."""

import dataclasses

import jax
import numpy as np
import pytest
from PIL import Image

from greedy_distill_jax import sample
from greedy_distill_jax.cli import sample_options
from greedy_distill_jax.codecs.vae_codec import VAECodec
from greedy_distill_jax.config import read_settings
from greedy_distill_jax.data.sources.registry import load_source
from greedy_distill_jax.data.video_io import read_frames
from greedy_distill_jax.errors import UserError
from greedy_distill_jax.models.students.etm_sdd import Student
from greedy_distill_jax.models.wan.dit import Teacher
from greedy_distill_jax.runs.given import read_given
from greedy_distill_jax.runs.run import Run
from greedy_distill_jax.streaming.recording import Recording
from greedy_distill_jax.testing import tiny
from greedy_distill_jax.testing.vae import TINY, random_params
from greedy_distill_jax.text.hashed_words import HashWordEncoder
from greedy_distill_jax.text.vocabulary import vocabulary

FRAMES, PROMPTS = 4, ["a red square moving left", "a blue circle moving up"]
WORDS = vocabulary(PROMPTS, text_len=6)


@pytest.fixture(scope="module")
def codec():
    return load_source("moving_shapes")[1]


def _run(stage, codec, meta):
    config = tiny.train_config(stage, data__frames=FRAMES, student__rope_frames=FRAMES, sample__steps=1)
    settings, shape = read_settings(config), (FRAMES, *codec.latent_shape(16, 16))
    model = Teacher(settings.wan) if stage == "teacher" else Student(settings.student_config)
    params = tiny.random_params(model, latent_shape=shape)
    return Run(settings, model, params, codec, HashWordEncoder(settings.wan.text_len, 8), shape, meta)


@pytest.fixture
def run(request, codec, monkeypatch):
    """A run of random weights, which ``--checkpoint`` loads."""
    out = _run(request.param, codec, {"words": WORDS})
    monkeypatch.setattr(Run, "load", lambda directory, **options: out)
    return out


def _sample(folder, *arguments, prompts=PROMPTS[:1]):
    """The frames of every video."""
    folder.mkdir(exist_ok=True)
    given = [word for prompt in prompts for word in ("--prompt", prompt)]
    sample.main(["--checkpoint", str(folder), "--output", str(folder / "out.mp4"), *given, *map(str, arguments)])
    return [np.stack(list(read_frames(path))) for path in sorted(folder.glob("*.mp4"))]


@pytest.mark.parametrize("run", ["teacher", "teacher_forcing"], indirect=True)
def test_a_prompt_gives_the_video_it_gives_alone(run, tmp_path, capsys):
    options = "--frames", 4, "--seed", 3
    alone = [_sample(tmp_path / f"alone{i}", *options, prompts=[prompt])[0] for i, prompt in enumerate(PROMPTS)]
    assert (alone[0] != alone[1]).any() and capsys.readouterr().err.count("warning") == 0
    mixed = _sample(tmp_path / "mixed", *options, prompts=[PROMPTS[1], PROMPTS[0], PROMPTS[1]])
    for video, number in zip(mixed, (1, 0, 1), strict=True):
        np.testing.assert_array_equal(video, alone[number])
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    assert told == [
        f"warning: --prompt {PROMPTS[1]!r}, given 2 times, is the same video 2 times; another --seed makes another."
    ]
    assert (_sample(tmp_path / "other", "--frames", 4, "--seed", 4)[0] != alone[0]).any()


@pytest.mark.parametrize("run", ["teacher_forcing"], indirect=True)
def test_a_second_start_compiles_nothing(run, tmp_path, start):
    folder, videos, counts = tmp_path / "programs", [], []
    for _ in range(2):
        start(tmp_path / "another")
        videos += _sample(tmp_path / "out", "--frames", 4, "--compile-cache", folder)
        counts.append((start.read, start.kept))
    assert list(folder.glob("jit_make-*-cache")) and not list((tmp_path / "another").glob("jit_make-*"))
    (_, kept), (read, more) = counts
    assert kept >= 5 and read >= kept and more == 0
    np.testing.assert_array_equal(*videos)


def _warnings(capsys):
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]


@pytest.mark.parametrize("run", ["teacher_forcing"], indirect=True)
def test_words_that_training_had_not_are_named_once_before_a_frame(run, tmp_path, capsys):
    switch = ["--frames", 4, "--switch", "2:a plaid circle moving up"]
    _sample(tmp_path, *switch, prompts=["a purple square moving left", "A RED square, moving left!"])
    assert _warnings(capsys) == ["warning: 'purple', 'plaid' were never seen in training: noise to this model."]
    _sample(tmp_path, "--frames", 4, "--switch", "2:", prompts=["?!"])
    assert _warnings(capsys) == [
        "warning: prompt '?!' has no word: its video follows no caption.",
        "warning: prompt '' has no word: its video follows no caption.",
    ]
    run.session(["a red square moving left"]).switch_prompts("a cubic square")
    assert _warnings(capsys) == ["warning: 'cubic' was never seen in training: noise to this model."]


@pytest.mark.parametrize("run", ["teacher"], indirect=True)
def test_words_of_a_negative_prompt_are_named(run, tmp_path, capsys):
    _sample(tmp_path, "--frames", 4, "--negative-prompt", "a blurry square")
    assert _warnings(capsys) == ["warning: 'blurry' was never seen in training: noise to this model."]
    _sample(tmp_path, "--frames", 4, "--negative-prompt", "")
    assert _warnings(capsys) == []


def test_nothing_is_said_where_words_are_not_known_or_all_have_a_meaning(codec, capsys):
    old, other = _run("teacher", codec, {}), _run("teacher", codec, {"words": WORDS})
    other.encoder = lambda prompts: np.zeros((len(prompts), 6, 8), np.float32)
    for run in (old, other):
        run.text(["a purple square"])
        assert _warnings(capsys) == []
        run.text([" "])
        assert _warnings(capsys) == ["warning: prompt ' ' has no word: its video follows no caption."]


def test_two_switches_at_one_frame_are_refused():
    with pytest.raises(UserError, match="frame 3 has two new prompts, ") as error:
        sample_options.parse_switches(["3:a", "5:b", "03:a"])
    assert error.value.field == "switches"
    assert sample_options.parse_switches(["5:b", "3:a:c"]) == {3: "a:c", 5: "b"}


@pytest.mark.parametrize("seed", [2**32, -1, 2**64])
def test_seeds_that_would_be_another_ones_are_refused(codec, seed):
    for stage in ("teacher", "teacher_forcing"):
        with pytest.raises(UserError, match=f"seed is {seed}; it must be from 0 to 4294967295") as error:
            _run(stage, codec, {}).sample_videos(PROMPTS[:1], seed=seed)
        assert error.value.field == "seed"
    with pytest.raises(UserError, match=r"config\.seed"):
        read_settings(tiny.train_config(seed=seed))


def test_a_key_gives_every_video_noise_of_its_own(codec):
    run, key = _run("teacher", codec, {}), jax.random.key(5)
    same, other = PROMPTS[:1] * 2, run.sample_latents(PROMPTS[:1] * 2, seed=key)
    assert (other[0] != other[1]).any()
    one = run.sample_latents(same, seed=5)
    np.testing.assert_array_equal(one[0], one[1])
    per_video = run.sample_latents(same, seed=jax.random.split(key, 2))
    assert (per_video[0] != per_video[1]).any()
    np.testing.assert_array_equal(one, run.sample_latents(same, seed=jax.numpy.stack([key, key])))
    with pytest.raises(ValueError, match="keys of shape \\(3,\\) for 2 videos"):
        run.sample_latents(same, seed=jax.random.split(key, 3))


@pytest.fixture
def shapes():
    """Frames of a moving shape, which the run's codec keeps at 29 dB."""
    return load_source("moving_shapes")[0][0]["video"][:FRAMES]


@pytest.fixture
def given(tmp_path, shapes):
    """A folder of the frames as images, in the order of numbers, not of letters."""
    folder = tmp_path / "frames"
    folder.mkdir()
    for number, frame in zip((1, 2, 10, 11), shapes, strict=True):
        Image.fromarray(frame).save(folder / f"frame_{number}.png")
    return folder


@pytest.mark.parametrize("run", ["teacher_forcing"], indirect=True)
def test_a_video_goes_on_behind_given_frames(run, shapes, given, tmp_path, capsys):
    latents = read_given(run, given, fps=8)
    np.testing.assert_array_equal(latents[0], run.codec.encode(shapes))

    def expected(latents, frames):
        """The video of a session that is given these latents, through a file."""
        session = run.session(PROMPTS[:1], seed=3)
        session.give(latents)
        with Recording([tmp_path / "expected.mp4"], fps=8, upscale=1) as recording:
            for chunk in session.play(frames):
                recording.write(chunk)
        return np.stack(list(read_frames(tmp_path / "expected.mp4")))

    options = "--seed", 3, "--upscale", 1
    (video,) = _sample(tmp_path / "out", "--given", given, "--frames", 7, *options)
    np.testing.assert_array_equal(video, expected(latents, 7))
    np.save(tmp_path / "given.npy", latents[0])
    (again,) = _sample(tmp_path / "latents", "--given", tmp_path / "given.npy", "--frames", 7, *options)
    np.testing.assert_array_equal(again, video)
    assert (video != _sample(tmp_path / "alone", "--frames", 7, *options)[0]).any()
    last = read_given(run, given / "frame_11.png", fps=8)
    (video,) = _sample(tmp_path / "last", "--given", given, "--given-frames", 1, "--frames", 4, *options)
    np.testing.assert_array_equal(video, expected(last, 4))
    assert "note" not in capsys.readouterr().err


@pytest.mark.parametrize("run", ["teacher_forcing"], indirect=True)
def test_given_frames_of_another_size_and_rate_are_fitted_and_named(run, shapes, tmp_path, capsys):
    with Recording([tmp_path / "in.mp4"], fps=16, upscale=2) as recording:
        recording.write(np.repeat(shapes, 2, axis=0)[None])
    latents = read_given(run, tmp_path / "in.mp4", fps=8)
    told = "4 of 4 frames are given, cropped and resized from 32x32 to 16x16, resampled from 16 to 8 frames per second"
    assert f"note: {tmp_path / 'in.mp4'}: {told}." in capsys.readouterr().err
    assert np.abs(run.codec.decode(latents)[0].astype(int) - shapes).mean() < 12


@pytest.mark.parametrize("run", ["teacher_forcing"], indirect=True)
def test_given_images_are_taken_as_they_are_shown(run, shapes, tmp_path):
    turned, clear = Image.fromarray(np.rot90(shapes[0])), Image.fromarray(shapes[0])
    exif = turned.getexif()
    exif[0x0112] = 6  # orientation: a quarter turn clockwise
    turned.save(tmp_path / "turned.png", exif=exif)
    clear.putalpha(0)
    clear.save(tmp_path / "clear.png")
    for name, shown in (("turned.png", shapes[:1]), ("clear.png", np.zeros_like(shapes[:1]))):
        np.testing.assert_array_equal(read_given(run, tmp_path / name, fps=8)[0], run.codec.encode(shown))


@pytest.mark.parametrize("run", ["teacher_forcing"], indirect=True)
def test_given_frames_go_through_an_autoencoder_of_videos(run, given, tmp_path):
    codec = VAECodec(TINY, random_params(TINY))
    run = dataclasses.replace(run, codec=codec, latent_shape=(2, *codec.latent_shape(16, 16)))
    Image.open(given / "frame_1.png").save(given / "frame_3.png")
    frames = np.stack([np.array(Image.open(given / f"frame_{number}.png")) for number in (1, 2, 3, 10, 11)])
    np.testing.assert_array_equal(read_given(run, given, fps=8)[0], codec.encode(frames))
    np.testing.assert_array_equal(read_given(run, given, fps=8, last=1)[0], codec.encode(frames[-1:]))
    with pytest.raises(UserError, match=r"4 frames do not fit the codec, which makes 1 \+ 4 k of them; choose 1 or 5"):
        read_given(run, given, fps=8, last=4)


@pytest.mark.parametrize("run", ["teacher_forcing"], indirect=True)
def test_what_cannot_be_given_is_refused(run, given, shapes, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.png").write_text("no image")
    turned = tmp_path / "turned"
    turned.mkdir()
    Image.fromarray(shapes[0]).save(turned / "a.png")
    Image.fromarray(shapes[0, 1:]).save(turned / "b.png")
    Image.fromarray(shapes[0].astype(np.uint16)[..., 0] * 257).save(tmp_path / "deep.png")
    latents = run.codec.encode(shapes)
    for name, array in (("size", latents[:, 1:]), ("none", latents[:0]), ("int", latents.astype(int))):
        np.save(tmp_path / f"{name}.npy", array)
    np.save(tmp_path / "nan.npy", np.full_like(latents, np.nan))
    np.save(tmp_path / "short.npy", latents)
    with (tmp_path / "ARCHIVE.NPY").open("wb") as archive:
        np.savez(archive, latents=latents)
    (tmp_path / "torn.npy").write_bytes((tmp_path / "ARCHIVE.NPY").read_bytes()[:100])
    np.save(tmp_path / "object.npy", np.array([{}]), allow_pickle=True)
    monkeypatch.setattr(type(run.codec), "encode", lambda *_: pytest.fail("encoded before it was checked"))
    for path, options, said in (
        (tmp_path / "gone.mp4", [], "--given: .*gone.mp4 does not exist; give a video"),
        (tmp_path / "empty", [], "--given: .*empty holds no image; put frames ending in .png"),
        (tmp_path / "text.png", [], "--given: .*text.png is no image that can be read"),
        (turned, [], "--given: .*b.png is of 16x15 pixels, 16x16 of a.png; make them equal"),
        (tmp_path / "deep.png", [], "--given: .*deep.png has pixels of the kind I;16; save it with 8 bits"),
        (
            tmp_path / "size.npy",
            [],
            r"--given: .*holds float32 \[4, 3, 4, 16\]; give clean latents of floating",
        ),
        (tmp_path / "none.npy", [], r"--given: .*\[0, 4, 4, 16\]; give .*, \[T, 4, 4, 16\] with T a multiple of 1"),
        (tmp_path / "int.npy", [], "--given: .*int.npy holds int64"),
        (tmp_path / "nan.npy", [], "--given: .*nan.npy holds values that are not finite"),
        (tmp_path / "object.npy", [], "--given: .*object.npy is no array of numpy's"),
        (tmp_path / "short.npy", [], "--frames: 4 frames are no more than the 4 of .*short.npy; make more"),
        (tmp_path / "ARCHIVE.NPY", [], r"--given: .*ARCHIVE.NPY is an archive of arrays \(.npz\)"),
        (tmp_path / "torn.npy", [], "--given: .*torn.npy is no array of numpy's"),
        (given, ["--given-frames", 4], "--frames: 4 frames are no more than the 4 that are given; make more"),
        (
            given,
            ["--frames", 8, "--given-frames", 5],
            "--given-frames: the last 5 frames .*, but .* has 4; ask for fewer",
        ),
        (given, ["--frames", 3], "--frames: 3 frames are no more than .*frames has; make more, or give the last ones"),
    ):
        with pytest.raises(UserError, match=said):
            _sample(tmp_path / "out", "--given", path, "--frames", 4, *options)
    with pytest.raises(UserError, match="--given-frames: 3 frames of what"):
        _sample(tmp_path / "out", "--given-frames", 3)
    chunks = dataclasses.replace(run, model=Student(dataclasses.replace(run.model.cfg, chunk=3)))
    with pytest.raises(UserError, match="the student's chunk of 3 latent frames; choose 3$") as error:  # of 4
        read_given(chunks, given, fps=8)
    assert error.value.field == "given_frames"
    with pytest.raises(UserError, match="1 frames do not fit .*; give at least 3$"):
        read_given(chunks, given / "frame_1.png", fps=8)


@pytest.mark.parametrize("run", ["teacher_forcing"], indirect=True)
def test_images_of_one_number_are_ordered_by_name(run, shapes, tmp_path, monkeypatch):
    for name, frame in (("frame_01.png", shapes[0]), ("frame_1.png", shapes[1])):
        Image.fromarray(frame).save(tmp_path / name)
    files, expected = sorted(tmp_path.iterdir()), run.codec.encode(shapes[:2])
    for order in (files, files[::-1]):
        monkeypatch.setattr(type(tmp_path), "iterdir", lambda folder, order=order: iter(order))
        np.testing.assert_array_equal(read_given(run, tmp_path, fps=8)[0], expected)


@pytest.mark.parametrize("run", ["teacher"], indirect=True)
def test_a_teacher_takes_no_given_frames(run, given, tmp_path):
    with pytest.raises(UserError, match="--given needs a streaming student"):
        _sample(tmp_path / "out", "--given", given)
