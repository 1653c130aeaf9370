"""Streams on real history, two rows per student: is it the cache or the denoiser that drifts?

Both rows begin with the same real frames, as many as a training video has, so that the stream and the real video are of
the same object; both have the same noise. From there one is the plain stream, the other looks back on real frames
except for its own last chunks (``streaming.refresh``). Of moving shapes these are the stream's own frames drawn again
as they should be: the real video itself has gone another way by then. Of other data they are the real video's.
"""

import dataclasses
import sys
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32
from tqdm import tqdm

from greedy_distill_jax.errors import UserError
from greedy_distill_jax.eval import oracle
from greedy_distill_jax.eval.comparison import HORIZON, Comparison, Entry
from greedy_distill_jax.eval.videos import held_out_videos, refreshed
from greedy_distill_jax.runs.run import Run


class Histories(NamedTuple):
    """What takes the place of streams' own history."""

    real_VTHWC: Float32[np.ndarray, "V T H W C"]  # latents of real videos, as long as the streams
    captions: list[str]  # of the videos
    keep: int  # last chunks of a stream that stay its own


def real_histories(runs: Mapping[str, Run], videos: int, seed: int, keep: int) -> Histories:
    """Real videos for the streams of a comparison.

    Args:
      runs: by row, of ``comparison.load_runs``.
      videos, seed: as for ``comparison.compare``.
      keep: last chunks of a stream that stay its own.

    Raises:
      UserError: with field "refresh_history": a stream keeps all its chunks, or the data give no videos so long.
    """
    teacher, field = runs["teacher"], "refresh_history"
    frames = HORIZON * teacher.latent_shape[0]
    for name, run in runs.items():
        made = (frames - teacher.latent_shape[0]) // run.model.cfg.chunk if run.is_student else keep + 2
        if keep + 1 >= made:
            raise UserError(
                f"{keep} last chunks stay of the {made} that {name} makes, so that nothing is replaced; choose at most "
                f"{made - 2}.",
                field,
            )
    remedy = f"histories need real videos of {frames} frames, as long as the streams; leave them out for these data"
    try:
        real, captions = held_out_videos(teacher, frames, videos, seed)
    except UserError as error:
        raise UserError(f"{remedy}: {error}", field) from error
    latents = teacher.codec.encode(real)
    if latents.shape[1] != frames:
        raise UserError(f"{remedy}: {teacher.settings.data.source} gave {latents.shape[1]}.", field)
    return Histories(latents, captions, keep)


def with_real_histories(comparison: Comparison, histories: Histories) -> Comparison:
    """The comparison with two more rows for every student's: "NAME, real start" and "NAME, refreshed history".

    Raises:
      UserError: with field "refresh_history": the data have other captions when their videos are longer.
    """
    if histories.captions != list(comparison.captions):
        raise UserError(
            f"the longer videos of {comparison.data} have other captions; leave histories out for these data.",
            "refresh_history",
        )
    students = [entry for entry in comparison.entries.values() if entry.run and entry.run.is_student]
    entries = dict(comparison.entries)
    for entry in tqdm(students, desc="on real history", disable=not sys.stderr.isatty()):
        entries |= {new.name: new for new in _two_rows(comparison, entry, histories)}
    return dataclasses.replace(comparison, entries=entries)


def _two_rows(comparison: Comparison, entry: Entry, histories: Histories) -> tuple[Entry, Entry]:
    start, whole = comparison.training_frames, histories.real_VTHWC.shape[1]
    steps = comparison.student.settings.sample.steps if entry.name == "stage1" else comparison.few_steps

    def row(name: str, keep: int, about: str, own_history: str = "") -> Entry:
        video = refreshed(
            entry.run,
            comparison.captions,
            histories.real_VTHWC,
            start=start,
            keep=keep,
            steps=steps,
            redraw=_redraw(comparison) if comparison.of_shapes else None,
            seed=comparison.seed,
        )
        return dataclasses.replace(entry, name=name, video_VTHWC=video, about=about, own_history=own_history)

    begun = f"{start} real frames, which the video begins with"
    own = row(f"{entry.name}, real start", whole, f"{entry.name} after {begun}.")
    about = f"The same after the same {start} frames, all history real but for its own last {histories.keep} chunks."
    return own, row(f"{entry.name}, refreshed history", histories.keep, about, own.name)


def _redraw(comparison: Comparison) -> Callable[[np.ndarray, slice], np.ndarray]:
    """``videos.refreshed``'s ``redraw`` for moving shapes: the real video's object where the stream has it."""
    shape_V = oracle.captioned(comparison.captions, len(comparison.captions))[:, 0]
    rgb_V3 = oracle.read(comparison.entries["data"].video_VTHWC).rgb_VT3.mean(1)
    return lambda video, part: oracle.redrawn(video, shape_V[part], rgb_V3[part])
