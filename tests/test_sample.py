"""The command sample: every prompt by itself, words without a meaning, switches that contradict each other."""

import jax
import numpy as np
import pytest

from greedy_distill_jax import sample
from greedy_distill_jax.cli import sample_options
from greedy_distill_jax.config import read_settings
from greedy_distill_jax.data.sources.registry import load_source
from greedy_distill_jax.data.video_io import read_frames
from greedy_distill_jax.errors import UserError
from greedy_distill_jax.models.students.etm_sdd import Student
from greedy_distill_jax.models.wan.dit import Teacher
from greedy_distill_jax.runs.run import Run
from greedy_distill_jax.testing import tiny
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
