"""Moving shapes: deterministic, inside the frame, moving as captioned, with a fair held-out split."""

import pickle

import numpy as np
import pytest

from greedy_distill_jax.data.sources import moving_shapes as ms
from greedy_distill_jax.errors import UserError


def test_video_depends_on_seed_split_and_index_alone():
    source, again = ms.MovingShapes(seed=3), pickle.loads(pickle.dumps(ms.MovingShapes(seed=3)))
    a, b = source[7], again[7]
    assert a["video"].shape == (8, 16, 16, 3) and a["video"].dtype == np.uint8
    np.testing.assert_array_equal(a["video"], b["video"])
    assert a["caption"] == b["caption"]
    others = [ms.MovingShapes(seed=4)[7], ms.MovingShapes(seed=3, split="held_out")[7], source[8]]
    assert all((other["video"] != a["video"]).any() for other in others)
    assert len(source) == 2**31 - 1 and source[2**31 - 2]["video"].any()


def test_longer_video_continues_the_shorter_one():
    np.testing.assert_array_equal(ms.MovingShapes(frames=32)[5]["video"][:8], ms.MovingShapes(frames=8)[5]["video"])


def test_held_out_captions_leave_every_pair_in_training():
    train, held_out = ms.captions("train"), ms.captions("held_out")
    assert (len(train), len(held_out), len(set(train) | set(held_out))) == (36, 12, 48)
    for pair in ([0, 1], [0, 2], [1, 2]):
        seen = {tuple(np.array(ms.attributes(caption))[pair]) for caption in train}
        assert {tuple(np.array(ms.attributes(caption))[pair]) for caption in held_out} <= seen
    # and no attribute is held out more often than another
    assert all(np.bincount(column).std() == 0 for column in np.array([ms.attributes(c) for c in held_out]).T)


def test_splits_draw_from_their_captions():
    source = ms.MovingShapes(split="held_out")
    assert [source[i]["caption"] for i in range(24)] == list(ms.captions("held_out")) * 2
    source = ms.MovingShapes()
    assert {source[i]["caption"] for i in range(600)} == set(ms.captions("train"))


@pytest.mark.parametrize("size", [16, 24, 40])
def test_motion_is_the_captioned_one(size):
    source = ms.MovingShapes(size=size, frames=64)
    states = [source.state(i) for i in range(300)]
    position = np.stack([state.position_T2 for state in states])
    r = ms.radius(size)
    assert position.min() >= r - 1e-9 and position.max() <= size - r + 1e-9
    heading = ms.DIRECTION_XY[[state.direction for state in states]]
    along = np.einsum("vtk,vk->vt", np.diff(position, axis=1), heading) * 16 / size
    across = np.einsum("vtk,vk->vt", np.diff(position, axis=1), heading[:, ::-1])
    assert np.abs(across).max() < 1e-9
    assert along[:, :2].min() >= 0.2 - 1e-9  # the first two steps never bounce
    assert along[:, :2].max() <= 2.4 + 1e-9
    assert abs(along[:, :2].mean() - 1.3) < 0.1 and abs(along[:, :2].std() - 0.635) < 0.05
    assert (along < 0).any()  # and later ones do


def test_draw_broadcasts_and_antialiases():
    position = np.array([[5.0, 6.0], [9.5, 8.0], [8.25, 8.5]])
    frames = ms.draw(np.arange(3), np.array([0, 1, 3]), position, 16)
    assert frames.shape == (3, 16, 16, 3)
    for k in range(3):
        np.testing.assert_array_equal(frames[k], ms.draw(k, (0, 1, 3)[k], position[k], 16))
    r, pixels = ms.radius(16), ms.coverage(np.arange(3), np.full((3, 2), 8.0), 16).sum((1, 2))
    np.testing.assert_allclose(pixels, [4 * r * r, np.pi * r * r, 2 * r * r], rtol=0.06)
    np.testing.assert_array_equal(frames[0, 6, 5], ms.COLOUR_RGB[0])
    assert (frames[0, 15, 15] == ms.BACKGROUND).all()


@pytest.mark.parametrize("bad", [{"size": 4}, {"frames": 0}, {"split": "test"}, {"seed": -1}, {"length": 0}])
def test_bad_arguments_name_the_value(bad):
    with pytest.raises(UserError, match=str(next(iter(bad.values())))):
        ms.MovingShapes(**bad)


def test_unknown_caption_and_index():
    with pytest.raises(UserError, match="purple"):
        ms.attributes("a purple square moving left")
    with pytest.raises(IndexError):
        ms.MovingShapes(length=3)[3]


def test_wandering_shapes_hide_colour_tint_axis_and_heading():
    source = ms.MovingShapes(frames=40, motion="wandering", seed=3)
    states = [source.state(i) for i in range(200)]
    assert {source[i]["caption"] for i in range(50)} == {f"a {shape} wandering" for shape in ms.SHAPES}
    assert ms.attributes("a circle wandering") == (1, -1, -1)
    assert {s.colour for s in states} == {0, 1, 2, 3} and all(s.direction == -1 for s in states)
    tints = np.stack([s.tint for s in states])
    assert np.abs(tints).max() <= 24 and np.abs(tints.mean()) < 3 and tints.std() > 10
    moved = np.stack([np.abs(np.diff(s.position_T2, axis=0)).sum(0) for s in states])
    assert (np.minimum(*moved.T) == 0).all() and 0.3 < (moved[:, 0] > 0).mean() < 0.7
    # Any part of a video looks like any other: positions and bounces as late as early.
    along = np.stack([s.position_T2[:, int(m[1] > 0)] for s, m in zip(states, moved, strict=True)])
    early, late = along[:, :8], along[:, -8:]
    assert abs(early.mean() - late.mean()) < 0.4 and abs(early.std() - late.std()) < 0.4
    steps = np.sign(np.diff(along, axis=1))
    assert 0.35 < (steps[:, 0] > 0).mean() < 0.65
    plain = ms.MovingShapes(frames=40, seed=3)
    assert plain.state(5).tint.tolist() == [0, 0, 0]


def test_held_out_wandering_shapes_are_other_videos():
    train, held_out = (ms.MovingShapes(motion="wandering", split=split) for split in ms.SPLITS)
    assert not np.array_equal(train[0]["video"], held_out[0]["video"])
    pairs = [(held_out.state(i).shape, held_out.state(i).colour) for i in range(12)]
    assert len(set(pairs)) == 12


def test_an_unknown_motion_is_refused():
    with pytest.raises(UserError, match="motion='swimming' is unknown; use one of captioned, wandering"):
        ms.MovingShapes(motion="swimming")
