"""Next-frame PSNR with students whose prediction is known."""

import jax.numpy as jnp
import numpy as np
import pytest

from greedy_distill_jax.data.sources.registry import load_source
from greedy_distill_jax.diffusion.step_plan import StepPlan
from greedy_distill_jax.eval.next_frame import next_frame_psnr, psnr
from greedy_distill_jax.models.students.etm_sdd import Student
from greedy_distill_jax.testing import tiny

FRAMES, COUNT = 8, 11  # a last batch that is not full


class Stub(Student):
    """Answers with the velocity that leads to a given x0 at sigma 1; ``predict`` makes it from the history."""

    def __init__(self, predict, chunk):
        super().__init__(tiny.student_config(chunk=chunk))
        self.predict = predict

    def __call__(self, params, x_BTHWC, sigma_BT, text_BMC, history):
        assert text_BMC.shape[0] == x_BTHWC.shape[0] and sigma_BT.shape == (x_BTHWC.shape[0], 1)
        return x_BTHWC - self.predict(history.frames_BTHWC, self.cfg.chunk)


PLAN = StepPlan(((1.0,),))


def _perfect(frames, chunk):
    return frames


def _copy(frames, chunk):
    """Every frame of a chunk is the last frame of the chunk before."""
    last = jnp.repeat(frames[:, chunk - 1 :: chunk], chunk, axis=1)
    return jnp.concatenate([frames[:, :chunk], last[:, :-chunk]], axis=1)


@pytest.fixture(scope="module")
def data():
    source, codec = load_source("moving_shapes", "held_out", size=16, frames=FRAMES, seed=5)
    return np.stack([source[i]["video"] for i in range(COUNT)]), codec


def _scores(data, predict, chunk):
    text = jnp.zeros((COUNT, tiny.BASE.text_len, tiny.BASE.text_dim), jnp.float32)
    return next_frame_psnr(Stub(predict, chunk), {}, data[1], data[0], text, PLAN, batch=4)


@pytest.mark.parametrize("chunk", [1, 2])
def test_a_perfect_student_reaches_the_codec(data, chunk):
    scores = _scores(data, _perfect, chunk)
    assert set(scores) == {"student", "repeat", "repeat_decoded", "codec"}
    assert scores["student"] == pytest.approx(scores["codec"], abs=0.01)
    assert scores["codec"] > 25 > scores["repeat"]


@pytest.mark.parametrize("chunk", [1, 2])
def test_a_copying_student_equals_the_decoded_repetition(data, chunk):
    scores = _scores(data, _copy, chunk)
    assert scores["student"] == pytest.approx(scores["repeat_decoded"], abs=0.01)
    assert scores["student"] < scores["codec"] - 3


@pytest.mark.parametrize("chunk", [1, 2])
def test_repeat_and_codec_by_hand(data, chunk):
    video, codec = data
    scores = _scores(data, _perfect, chunk)
    targets = range(2 * chunk, FRAMES)
    before = {t: video[:, t // chunk * chunk - 1].astype(float) for t in targets}
    error = np.mean([(before[t] - video[:, t]) ** 2 for t in targets])
    assert scores["repeat"] == pytest.approx(10 * np.log10(255**2 / error), rel=1e-9)
    decoded = codec.decode(codec.encode(video)).astype(float)
    error = np.mean([(decoded[:, t] - video[:, t]) ** 2 for t in targets])
    assert scores["codec"] == pytest.approx(10 * np.log10(255**2 / error), rel=1e-9)


def test_psnr():
    black, grey = np.zeros((2, 4, 4, 3), np.uint8), np.full((2, 4, 4, 3), 51, np.uint8)
    assert psnr(black, grey) == pytest.approx(20 * np.log10(5))  # no wrap-around of uint8
    assert psnr(grey, black) == psnr(black, grey) and psnr(grey, grey) == float("inf")
