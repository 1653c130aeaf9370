"""Does a stream drift because of its cache or because of its denoiser? What returns when its old history is real.

Both streams begin with the same real frames and have the same noise (``histories.py``). What the plain one loses from
its first own window to its last is compared with what real history gives back in the last one, video by video. If it
returns, the cache was bad; if not, the denoiser is (OPSD-V, arXiv 2607.08766).
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float32, Shaped, UInt8

from greedy_distill_jax.eval import oracle
from greedy_distill_jax.eval.comparison import Comparison
from greedy_distill_jax.eval.metrics import standard_error
from greedy_distill_jax.eval.suites import Column, Measured, Suite
from greedy_distill_jax.eval.tables import NOT_THERE, shown

ERRORS = 2  # standard errors that a figure must be away from what it is told apart from
HALF = 0.5  # of the loss: above it the cache is to blame, below the denoiser
COLUMNS = (
    Column("stream", "Stream", format="text"),
    Column("figure", "Figure", "What is lost, see the text above; more is better.", format="text"),
    Column("first", "First window", "Of the plain stream, right after the real frames.", format="distance"),
    Column(
        "lost",
        "Lost",
        "How much lower it is in the plain stream's last window.",
        format="distance",
        better="lower",
        error="lost_se",
    ),
    Column(
        "returned",
        "Returned",
        "How much higher the last window of the stream on real history is than the plain one's.",
        format="distance",
        error="returned_se",
    ),
    Column(
        "share",
        "Share that returns",
        f"Returned over lost; none where the loss is not above {ERRORS} standard errors.",
        format="share",
        error="share_se",
    ),
    Column(
        "verdict",
        "Verdict",
        f"The cache where more than half of the loss returns, the denoiser where less does, by {ERRORS} standard "
        "errors; open in between.",
        format="text",
    ),
)


class Share(NamedTuple):
    """How much of a loss returns, with standard errors over videos."""

    lost: float
    lost_se: float
    returned: float
    returned_se: float
    share: float | None  # None where nothing was lost
    share_se: float | None
    verdict: str


def share_of(lost_V: Float[np.ndarray, " V"], returned_V: Float[np.ndarray, " V"]) -> Share:
    """The share of a loss that returns, a ratio of means; its error is that of first order (delta method).

    Args:
      lost_V: what every video loses from its first window to its last.
      returned_V: how much better its last window is on real history.
    """
    lost, returned, lost_se = lost_V.mean(), returned_V.mean(), standard_error(lost_V)
    found = tuple(map(float, (lost, lost_se, returned, standard_error(returned_V))))
    if not lost > ERRORS * lost_se:  # nor with one video, whose error is nan
        return Share(*found, None, None, "nothing was lost")
    share = float(returned / lost)
    error = standard_error((returned_V - share * lost_V) / lost)
    if abs(share - HALF) <= ERRORS * error:
        return Share(*found, share, error, "open")
    return Share(*found, share, error, "the cache" if share > HALF else "the denoiser")


def figures(
    video_VTHWC: UInt8[np.ndarray, "V T H W 3"],
    captions: Sequence[str],
    rgb_V3: Float32[np.ndarray, "V 3"],
    window: int,
) -> dict[str, Shaped[np.ndarray, "V T"]]:
    """Returns by name what may be lost, of every frame; more is better.

    Args:
      video_VTHWC: of a stream.
      captions: of the videos.
      rgb_V3: colour in [0, 1] of the objects in the real videos.
      window: first frames, which tell an object's colour where its caption does not (``oracle.valid``).
    """
    reading = oracle.read(video_VTHWC)
    return {
        "valid frames": oracle.valid(reading, captions, window=window),
        "quality": reading.iou_VT,
        "colour kept": 1.0 - np.abs(reading.rgb_VT3 - rgb_V3[:, None]).mean(-1),
    }


def measure(comparison: Comparison) -> Measured:
    """Measures every stream on real history against the plain one after the same start."""
    window, rows, sentences = comparison.training_frames, [], []
    rgb_V3 = oracle.read(comparison.entries["data"].video_VTHWC).rgb_VT3.mean(1)
    for entry in comparison.entries.values():
        if not entry.own_history:
            continue
        own, real = (
            figures(comparison.entries[name].video_VTHWC, comparison.captions, rgb_V3, window)
            for name in (entry.own_history, entry.name)
        )
        told = []
        for figure, values in own.items():
            first_V, last_V = values[:, window : 2 * window].mean(1), values[:, -window:].mean(1)
            found = share_of(first_V - last_V, real[figure][:, -window:].mean(1) - last_V)
            row = {"stream": entry.own_history, "figure": figure, "first": float(first_V.mean()), **found._asdict()}
            rows.append(row | {"share": NOT_THERE if found.share is None else found.share})
            if found.share is not None:
                of = f"{shown(found.share, 'share')} ± {shown(found.share_se, 'share')}"
                told.append(f"{of} of the loss of {figure} returns: {found.verdict}")
        said = f"with real history {'; '.join(told)}" if told else f"nothing was lost of {', '.join(own)}"
        sentences.append(f"{entry.own_history}: {said}.")
    return Measured(rows, note=" ".join(sentences))


SUITE = Suite(
    name="refreshed_history",
    title="The cache or the denoiser",
    text="The same stream twice after the same real frames: on its own history, and with all of it but its last chunks "
    "replaced by real frames, which show the object where the stream has it, in its true shape and colour; how it "
    "moves stays the stream's own and is not judged. “Valid frames” and “quality” are those of the plots above, "
    "“colour kept” is 1 less the mean difference to the real object's colour. The first window is the one after the "
    "real frames. What a stream loses and gets back with real history was the fault of its cache; what does not come "
    "back is its denoiser's, which then passes its errors on through the chunks that stay.",
    columns=COLUMNS,
    measure=measure,
    applies=lambda comparison: comparison.of_shapes and any(e.own_history for e in comparison.entries.values()),
)
