"""What a loss must be and return, whoever wrote it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from greedy_distill_jax import losses
from greedy_distill_jax.config import read_settings
from greedy_distill_jax.errors import UserError
from greedy_distill_jax.losses import Term
from greedy_distill_jax.testing import tiny
from greedy_distill_jax.training.update import logged, total_loss

BATCH = {"text": np.zeros((3, 2, 2), np.float32), "latents": np.ones((3, 4, 2, 2, 1), np.float32)}
GOOD = np.asarray([1.0, 2.0, 6.0], np.float32)


def total(out):
    """What ``total_loss`` makes of a loss that returns this."""
    return total_loss(
        [Term("mine", lambda net, batch, key: out, 0.5, {}, "config.losses.mine")], None, BATCH, jax.random.key(0)
    )


@pytest.mark.parametrize(
    "out, said",
    [
        (GOOD, "a ndarray; return .loss_B, metrics."),
        ((GOOD,), "a tuple of 1; return"),
        ((GOOD, {}, {}), "a tuple of 3; return"),
        ([GOOD, {}], "a list; return"),
        ((GOOD, None), "a tuple of 2; return"),
        (None, "a NoneType; return"),
        (
            (GOOD.mean(), {}),
            r"float32\[\] for 3 examples; return one number per example, shape \[3\], without",
        ),
        ((2.0, {}), "a float for 3 examples"),
        ((GOOD[:, None], {}), r"float32\[3, 1\] for 3"),
        ((GOOD[:2], {}), r"float32\[2\] for 3"),
        ((GOOD.astype(np.complex64), {}), r"complex64\[3\] for 3"),
        ((list(GOOD), {}), "a list for 3"),
        ((GOOD, {"note": "fine"}), "the metric 'note' as a str; a metric has a name and is a scalar, or a pair"),
        ((GOOD, {"each": GOOD}), r"the metric 'each' as float32\[3\]"),
        ((GOOD, {"pair": (GOOD, 3.0)}), "the metric 'pair' as a tuple"),
        ((GOOD, {"three": (1.0, 2.0, 3.0)}), "the metric 'three' as a tuple"),
        ((GOOD, {"none": None}), "the metric 'none' as a NoneType"),
        ((GOOD, {0: 1.0}), "the metric 0 as a float"),
    ],
)
def test_what_is_no_loss_is_refused_by_its_key(out, said):
    with pytest.raises(UserError, match=rf"^config\.losses\.mine: the loss returned {said}"):
        total(out)


@pytest.mark.parametrize("dtype", [np.float32, np.int32, jnp.bfloat16])
def test_a_loss_is_averaged_in_float32_and_its_metrics_are_float32(dtype):
    loss, metrics = total((GOOD.astype(dtype), {"count": 3, "pair": (jnp.bfloat16(6), 2), "on": True}))
    metrics = logged(metrics)
    assert {name: (float(x), x.dtype) for name, x in metrics.items()} == {
        "mine": (3.0, np.float32),
        "mine/count": (3.0, np.float32),
        "mine/pair": (3.0, np.float32),
        "mine/on": (1.0, np.float32),
    }
    assert float(loss) == 1.5


def test_a_mistake_in_it_passes_as_it_is():
    def wrong(net, batch, key):
        return batch["videos"]

    with pytest.raises(KeyError, match="videos"):
        total_loss([Term("mine", wrong, 1.0, {})], None, BATCH, jax.random.key(0))


def needs(net, batch, key, *, scale):
    """A loss whose option has no default."""


def by_position(net, batch, key, margin):
    """One whose option is not keyword-only."""


def short(net, batch):
    """One that takes no key."""


@pytest.mark.parametrize(
    "loss, options, said",
    [
        (
            needs,
            {},
            "mine: 'mine' asks for 'scale' of stage teacher.*or give 'scale' a default",
        ),
        (needs, {"scale": 2.0}, "mine.options: loss 'mine' takes 'scale' from the stage, because it has no default"),
        (
            by_position,
            {},
            r"mine.loss: loss 'mine' takes \(net, batch, key, margin\) by position; write loss",
        ),
        (short, {}, r"mine.loss: loss 'mine' takes \(net, batch\) by position; write"),
        (3.0, {}, "mine.loss: loss 'mine' is a float, not a function"),
    ],
)
def test_a_loss_that_cannot_be_called(monkeypatch, loss, options, said):
    monkeypatch.setitem(losses._LOSSES, "mine", loss)
    config = tiny.train_config()
    config.losses.mine = dict(loss="mine", weight=1.0, options=options)
    with pytest.raises(UserError, match=rf"^config\.losses\.{said}"):
        read_settings(config)
