"""Procedural rewards on videos whose fault is known: each falls where it should, stays where it should."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from greedy_distill_jax import rewards
from greedy_distill_jax.errors import UserError
from greedy_distill_jax.rewards import HostView, RewardTerm, View

FRAMES, SIZE, CHUNK = 8, 16, 4
OPTIONS = {"seam": {"chunk": CHUNK}, "motion_band": {}, "anti_drift": {"segments": 4}}
JAX = ("flicker", "motion_band", "anti_drift", "sharp_hold", "seam", "smooth2", "colour_kept")


def moving(start=0.0, frames=FRAMES, pace=0.7, row=5, rgb=(0.8, 0.3, 0.2)):
    """[T, H, W, 3]: a square with soft edges that moves to the right before a dark background."""
    x = np.arange(SIZE)[None] - (4.5 + start + pace * np.arange(frames)[:, None])
    across = 1 / (1 + np.exp(3 * (np.abs(x) - 3)))
    down = 1 / (1 + np.exp(3 * (np.abs(np.arange(SIZE) - row - 2) - 3)))
    cover = across[:, None, :, None] * down[None, :, None, None]
    return (0.1 + cover * (np.asarray(rgb) - 0.1)).astype(np.float32)


def videos():
    """({name: judged video}, first frames)."""
    good, along = moving(), np.linspace(0.1, 1, FRAMES, dtype=np.float32)[:, None, None, None]
    noise = np.random.default_rng(0).normal(size=good.shape).astype(np.float32)
    late = np.asarray([0] * CHUNK + [0.15] * CHUNK, np.float32)[:, None, None, None]
    hue = np.stack([moving(rgb=(0.8 - 0.5 * a, 0.3, 0.2 + 0.5 * a))[t] for t, a in enumerate(along.ravel())])
    return {
        "good": good,
        "frozen": np.repeat(good[:1], FRAMES, 0),
        "white": good + along * (1 - good),
        "noisy": np.clip(good + 0.15 * along * noise, 0, 1),
        "hue": hue,
        "cut": good + late,
        "flat": np.full_like(good, 0.5),
        "lower": moving(row=7),
        "fast": moving(start=-2, pace=2.0),
    }, moving(start=-1.0, frames=4)


@functools.cache
def judged():
    """{reward: {video: value}} and {reward: {video: gradient}} in one program."""
    named, first = videos()
    view = View(jnp.asarray(np.stack(list(named.values()))), jnp.asarray(np.stack([first] * len(named))))
    terms = [RewardTerm(name, rewards.resolve(name), options=OPTIONS.get(name, {})) for name in JAX]

    @jax.jit
    def run(view):
        def of(term, video):
            values = rewards.on_device([term], view._replace(video_BTHWC=video))[term.name]
            return jnp.sum(values), values

        found = {t.name: jax.grad(functools.partial(of, t), has_aux=True)(view.video_BTHWC) for t in terms}
        steps = {name: view.video_BTHWC + 1e-3 * g / (1e-12 + jnp.abs(g).max()) for name, (g, _) in found.items()}
        return found, {t.name: of(t, steps[t.name])[1] for t in terms}

    found, stepped = run(view)
    values = {name: dict(zip(named, np.asarray(values))) for name, (_, values) in found.items()}
    gradients = {name: dict(zip(named, np.asarray(gradient))) for name, (gradient, _) in found.items()}
    return values, gradients, {name: dict(zip(named, np.asarray(x))) for name, x in stepped.items()}


@pytest.mark.parametrize(
    "name, better, worse",
    [
        ("flicker", "frozen", "good"),  # the hack: stillness wins
        ("flicker", "good", "noisy"),
        ("flicker", "good", "cut"),
        ("smooth2", "good", "noisy"),
        ("smooth2", "frozen", "cut"),
        ("motion_band", "good", "frozen"),
        ("motion_band", "good", "fast"),
        ("anti_drift", "good", "white"),
        ("anti_drift", "good", "hue"),
        ("anti_drift", "good", "cut"),
        ("sharp_hold", "good", "noisy"),
        ("sharp_hold", "good", "white"),
        ("sharp_hold", "good", "flat"),
        ("seam", "good", "cut"),
        ("colour_kept", "good", "hue"),
        ("colour_kept", "good", "white"),
        ("colour_kept", "good", "flat"),
    ],
)
def test_it_prefers(name, better, worse):
    values, _, _ = judged()
    assert values[name][better] > values[name][worse] + 1e-3


@pytest.mark.parametrize(
    "name, video, value, tolerance",
    [
        ("flicker", "frozen", 0.0, 0.0),
        ("smooth2", "frozen", 0.0, 0.0),
        ("smooth2", "white", 0.0, 0.02),  # a fade goes at a constant pace
        ("seam", "frozen", 0.0, 0.0),
        ("seam", "good", 0.0, 0.02),
        ("motion_band", "good", 1.0, 0.05),
        ("motion_band", "lower", 1.0, 0.05),
        ("anti_drift", "frozen", 0.0, 1e-3),
        ("anti_drift", "lower", 0.0, 1e-3),  # it is elsewhere
        ("colour_kept", "lower", 0.0, 2e-3),
        ("sharp_hold", "lower", 0.0, 0.1),
    ],
)
def test_known_answers(name, video, value, tolerance):
    values, _, _ = judged()
    np.testing.assert_allclose(values[name][video], value, atol=tolerance)


def test_formulas():
    """Against the definitions in numpy, on the video with a cut."""
    values, _, _ = judged()
    v = videos()[0]["cut"].astype(np.float64)
    np.testing.assert_allclose(values["flicker"]["cut"], -np.abs(v[1:] - v[:-1]).mean(), rtol=1e-4)
    np.testing.assert_allclose(values["smooth2"]["cut"], -np.abs(v[:-2] - 2 * v[1:-1] + v[2:]).mean(), rtol=1e-4)
    change = np.abs(np.diff(v, axis=0)).mean((1, 2, 3)) + 1e-4
    inside = np.delete(change, CHUNK - 1).mean()
    np.testing.assert_allclose(values["seam"]["cut"], -(change[CHUNK - 1] / inside - 1), rtol=1e-3)


def test_colours_are_kept_since_the_first_frames_or_the_previous():
    hue, kept = videos()[0]["hue"], rewards.resolve("colour_kept")

    def value(video, first, **options):
        return float(kept(View(jnp.asarray(video)[None], jnp.asarray(first)[None]), **options)[0])

    weight = np.square(hue - 0.1).sum(-1, keepdims=True)  # the background is 0.1
    colour = (weight * hue).sum((1, 2)) / weight.sum((1, 2))
    pace = -np.abs(np.diff(colour, axis=0)).mean()
    np.testing.assert_allclose(value(hue, hue, since="previous"), pace, rtol=1e-2)
    np.testing.assert_allclose(value(hue[4:], hue[:2], since="previous"), pace, rtol=0.1)  # a fade counts by its pace
    np.testing.assert_allclose(value(hue[4:], hue[:2]), -np.abs(colour[4:] - colour[:2].mean(0)).mean(), rtol=1e-2)
    with pytest.raises(UserError, match="colour_kept: 1 frame is judged, it compares 2"):
        value(hue[:1], hue, since="previous")


@pytest.mark.parametrize("name", JAX)
def test_gradients_are_finite_and_lead_upwards(name):
    values, gradients, stepped = judged()
    assert rewards.resolve(name).differentiable
    for video, gradient in gradients[name].items():
        assert np.isfinite(gradient).all(), video
    video = "cut" if name == "seam" else "noisy"
    assert np.abs(gradients[name][video]).max() > 0
    assert stepped[name][video] > values[name][video]


@pytest.mark.parametrize(
    "name, options, judged_frames, first, said",
    [
        ("flicker", {}, 1, 4, "reward flicker: 1 frames are judged, it compares 2"),
        ("smooth2", {}, 2, 4, "reward smooth2: 2 frames are judged, it compares 3"),
        ("motion_band", {}, 4, 1, "reward motion_band: 1 first frames are given, it compares 2"),
        ("seam", {"chunk": 4}, 4, 4, "reward seam: 4 frames hold no seam between chunks of 4 that begin at frame 0"),
    ],
)
def test_too_few_frames(name, options, judged_frames, first, said):
    view = View(jnp.zeros((1, judged_frames, 4, 4, 3)), jnp.zeros((1, first, 4, 4, 3)))
    with pytest.raises(UserError, match=f"^{said}"):
        rewards.resolve(name)(view, **options)


def test_seams_lie_where_chunks_begin():
    video = np.zeros((1, 8, 4, 4, 3), np.float32)
    video[:, 3:] = 0.5
    view = View(jnp.asarray(video), jnp.zeros((1, 4, 4, 4, 3)))
    seam = rewards.resolve("seam")
    assert seam(view, chunk=4, start=3)[0] < -100
    assert seam(view, chunk=4, start=0)[0] == 0


def host_view(*videos, captions):
    video = np.asarray(np.stack(videos) * 255, np.uint8)
    return HostView(video, video, captions, 8.0)


def test_jpeg_size_prefers_what_compresses():
    named, _ = videos()
    flat, good, noisy = rewards.resolve("jpeg_size")(
        host_view(named["flat"], named["good"], named["noisy"], captions=[""] * 3)
    )
    assert 0 > flat > good > noisy
    coarse = rewards.resolve("jpeg_size")(host_view(named["good"], captions=[""]), quality=20)
    assert coarse[0] > good


def test_the_colour_that_the_caption_names():
    red, blue = moving(rgb=(0.9, 0.15, 0.15)), moving(rgb=(0.2, 0.3, 0.9))
    captions = ["a Red square", "a red square", "a blue square, not red", "a reddish square"]
    found = rewards.resolve("target_colour")(host_view(red, blue, blue, red, captions=captions))
    assert found.values[0] > found.values[1] + 0.2 and found.values[2] > found.values[1] + 0.2
    assert np.isnan(found.values[3]) and found.faults == ("the caption 'a reddish square' names no colour",)
