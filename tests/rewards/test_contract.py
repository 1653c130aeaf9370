"""What a reward must be and return, whoever wrote it, and what becomes of its faults."""

import threading
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from greedy_distill_jax import rewards
from greedy_distill_jax.errors import UserError
from greedy_distill_jax.rewards import HostView, Judged, RewardTerm, View

VIEW = View(jnp.zeros((3, 2, 2, 2, 3)), jnp.zeros((3, 1, 2, 2, 3)))
HOST = HostView(np.zeros((3, 2, 2, 2, 3), np.uint8), np.zeros((3, 1, 2, 2, 3), np.uint8), ["a", "b", "c"], 8.0)
GOOD = np.asarray([1.0, 2.0, 6.0], np.float32)


@pytest.fixture(autouse=True)
def registry(monkeypatch):
    monkeypatch.setattr(rewards, "_REWARDS", dict(rewards._REWARDS))


def returning(value, kind="host", **term):
    """A term whose reward returns this."""
    return RewardTerm("mine", rewards.reward(kind=kind)(lambda view: value), place="config.rewards.mine", **term)


@pytest.mark.parametrize("name", rewards.names())
def test_every_name_is_a_reward(name):
    found = rewards.resolve(name)
    assert found.name == name and found.kind in rewards.KINDS and found.__doc__ == found.function.__doc__ is not None
    assert not found.differentiable or found.kind == "jax"
    rewards.check_options(name, found, {})


def test_a_reward_of_ones_own_by_path_and_by_name(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "import jax.numpy as jnp\n"
        "from greedy_distill_jax import rewards\n\n\n"
        "@rewards.reward(kind='jax', differentiable=True)\n"
        "def bright(view, *, scale=1.0):\n"
        "    return scale * jnp.mean(view.video_BTHWC, axis=(1, 2, 3, 4))\n\n\n"
        "def plain(view):\n"
        "    return view\n"
    )
    bright = rewards.resolve(f"{file}:bright")
    assert (bright.kind, bright.differentiable, rewards.option_names(bright)) == ("jax", True, ["scale"])
    view = VIEW._replace(video_BTHWC=jnp.full((3, 2, 2, 2, 3), 0.5))
    term = RewardTerm("mine", bright, options={"scale": 4.0})
    np.testing.assert_array_equal(jax.jit(lambda v: rewards.on_device([term], v))(view)["mine"], 2.0)
    with pytest.raises(UserError, match=r"mine.py:plain' is a function that does not say its kind; write reward"):
        rewards.resolve(f"{file}:plain")

    @rewards.register("long_captions", kind="host")
    def long_captions(view):
        return np.asarray([len(caption) for caption in view.captions])

    assert rewards.resolve("long_captions") is long_captions
    np.testing.assert_array_equal(rewards.on_host([RewardTerm("n", long_captions)], HOST)["n"], 1.0)


def by_position(view, other):
    """One whose option is not keyword-only."""


def needs(view, *, scale):
    """One whose option has no default."""


@pytest.mark.parametrize(
    "function, said",
    [
        (by_position, r"reward 'mine' takes \(view, other\) by position; write reward"),
        (needs, "reward 'mine' has no default for its option 'scale'; give it one"),
    ],
)
def test_a_reward_that_cannot_be_called(function, said):
    rewards.register("mine", kind="host")(function)
    with pytest.raises(UserError, match=f"^{said}"):
        rewards.resolve("mine")


@pytest.mark.parametrize(
    "make, said",
    [
        (lambda: rewards.resolve("beauty"), "reward 'beauty' is not known; choose from anti_drift, colour_kept"),
        (lambda: rewards.resolve("none.py:f"), "reward 'none.py:f' cannot be loaded: there is no file"),
        (lambda: rewards.reward(kind="gpu"), "a reward's kind is 'gpu'; it must be one of jax, host, http"),
        (lambda: rewards.reward(kind="host", differentiable=True), "a reward of kind 'host' has no gradient"),
        (lambda: returning(GOOD, low=1.0, high=1.0), "config.rewards.mine: low is 1.0 and high 1.0"),
        (lambda: RewardTerm("a/b", rewards.resolve("flicker")), "the reward's name 'a/b' has a /"),
        (lambda: rewards.on_host([], HOST, failed="ignore"), "failed is 'ignore'; it must be one of mask, stop"),
    ],
)
def test_one_line_for_what_is_wrong(make, said):
    with pytest.raises(UserError, match=f"^{said}") as error:
        make()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name, options, said",
    [
        ("seam", {"chunks": 3}, "reward 'seam' has no option 'chunks'; keyword-only options it takes: chunk, start"),
        ("seam", {"chunk": 1}, "reward 'seam': option chunk is 1; it must be at least 2"),
        ("motion_band", {"width": 0}, "reward 'motion_band': option width is 0; it must be above 0"),
        ("jpeg_size", {"quality": 101}, "reward 'jpeg_size': option quality is 101; it must be from 1 to 100"),
        ("validity", {"iou": 2.0}, "reward 'validity': option iou is 2.0; it must be from 0 to 1"),
        ("http", {"retries": -1}, "reward 'http': option retries is -1; it must be at least 0"),
    ],
)
def test_options_are_checked(name, options, said):
    with pytest.raises(UserError, match=said):
        rewards.check_options(name, rewards.resolve(name), options)


@pytest.mark.parametrize(
    "value, said",
    [
        (jnp.float32(1), r"float32\[\] for 3 videos; return one number per video, shape \[3\]"),
        (jnp.zeros((3, 1)), r"float32\[3, 1\] for 3"),
        (jnp.zeros(2), r"float32\[2\] for 3"),
        ({"a": jnp.zeros(3)}, "a dict for 3"),
        (None, "a NoneType for 3"),
    ],
)
def test_what_is_no_reward_is_refused_on_the_device(value, said):
    with pytest.raises(UserError, match=rf"^config\.rewards\.mine: the reward returned {said}"):
        rewards.on_device([returning(value, "jax")], VIEW)


@pytest.mark.parametrize(
    "value, said",
    [
        (GOOD[:2], r"float32\[2\] for 3"),
        (list(GOOD), "a list for 3"),
        (np.asarray(["1", "2", "3"]), r"<U1\[3\] for 3"),
        ({"a": GOOD, "b": GOOD[:1]}, r"float32\[1\] as mine/b for 3"),
        (Judged(None, ()), "a NoneType for 3"),
    ],
)
@pytest.mark.parametrize("failed", rewards.FAILED)
def test_what_is_no_reward_is_refused_on_the_host(value, said, failed):
    with pytest.raises(UserError, match=rf"^config\.rewards\.mine: the reward returned {said}"):
        rewards.on_host([returning(value)], HOST, failed=failed)


def test_faults_on_the_device_are_nan_without_a_gradient():
    term = RewardTerm(
        "mine",
        rewards.reward(kind="jax")(lambda view: view.video_BTHWC[:, 0, 0, 0, 0] + jnp.asarray([0.0, 2.0, jnp.inf])),
        high=2.0,
    )

    def total(video):
        values = rewards.on_device([term, returning(GOOD)], VIEW._replace(video_BTHWC=video))
        return jnp.nansum(values["mine"]), values

    gradient, values = jax.grad(total, has_aux=True)(jnp.ones((3, 2, 2, 2, 3)))
    assert list(values) == ["mine"]
    np.testing.assert_array_equal(values["mine"], [1.0, np.nan, np.nan])
    np.testing.assert_array_equal(gradient[:, 0, 0, 0, 0], [1.0, 0.0, 0.0])


@pytest.mark.parametrize(
    "value, why",
    [
        (np.asarray([1.0, np.nan, 6.0]), "the reward gave NaN"),
        (np.asarray([1.0, np.inf, 6.0]), r"mine is inf, outside \[0, 10\]"),
        (np.asarray([1, 11, 6]), r"mine is 11, outside \[0, 10\]"),
        (Judged(np.asarray([1.0, np.nan, 6.0], np.float32), ("no face",)), "no face"),
    ],
)
def test_a_fault_of_one_video_is_masked_or_stops(value, why):
    term = returning(value, low=0.0, high=10.0)
    line = rf"^config\.rewards\.mine: 1 of 3 videos are not judged \({why}\)"
    with pytest.warns(UserWarning, match=line):
        found = rewards.on_host([term], HOST)["mine"]
    np.testing.assert_array_equal(found, np.asarray([1.0, np.nan, 6.0], np.float32))
    assert found.dtype == np.float32
    with pytest.raises(UserError, match=f"{line}; mend that, or leave such videos out"):
        rewards.on_host([term], HOST, failed="stop")


def test_several_values_of_a_reward_and_judges():
    several = {"VQ": GOOD, "MQ": GOOD.astype(np.int32)}
    terms = [
        RewardTerm("video", rewards.reward(kind="host")(lambda view: several), weight=0.5),
        RewardTerm("kept", rewards.reward(kind="host")(lambda view: GOOD), judge=True),
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        values = rewards.on_host(terms, HOST, failed="stop")
    assert list(values) == ["video/VQ", "video/MQ", "kept"]
    assert rewards.weights(terms, values) == {"video/VQ": 0.5, "video/MQ": 0.5}


def test_servers_are_asked_at_once_and_the_host_judges_meanwhile():
    """Each of the three waits for the other two."""
    meet = threading.Barrier(3, timeout=20)

    def judged(view):
        meet.wait()
        return GOOD

    terms = [RewardTerm(str(i), rewards.reward(kind=k)(judged)) for i, k in enumerate(("http", "host", "http"))]
    assert list(rewards.on_host(terms, HOST)) == ["0", "1", "2"]


def test_a_mistake_in_it_passes_as_it_is():
    def wrong(view):
        return view.frames

    for kind in ("host", "http"):
        with pytest.raises(AttributeError, match="frames"):
            rewards.on_host([RewardTerm("mine", rewards.reward(kind=kind)(wrong))], HOST)


def test_start_asks_each_reward_once_with_all_its_options():
    seen = []

    def ready(options):
        seen.append(options)
        if not options["url"]:
            raise UserError("no server.")

    def asks(view, *, url="", size=3):
        return GOOD

    reward = rewards.reward(kind="http", ready=ready)(asks)
    rewards.start([RewardTerm("mine", reward, options={"url": "u"}), returning(GOOD)])
    assert seen == [{"url": "u", "size": 3}]
    with pytest.raises(UserError, match=r"^config\.rewards\.mine: no server\."):
        rewards.start([RewardTerm("mine", reward, place="config.rewards.mine")])


def test_statistics():
    values = {"a": np.asarray([1.0, np.nan, 3.0, 5.0], np.float32), "b": jnp.full(2, jnp.nan)}
    found = {name: float(x) for name, x in jax.jit(rewards.statistics)(values).items()}
    expected = {"a/mean": 3.0, "a/std": np.std([1, 3, 5]), "a/min": 1.0, "a/max": 5.0, "a/nan": 0.25, "b/nan": 1.0}
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    assert np.isnan([found[f"b/{key}"] for key in ("mean", "std", "min", "max")]).all()
