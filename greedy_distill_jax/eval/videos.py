"""Videos to judge: held-out real ones, and a run's own for the same captions."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float32, UInt8

from greedy_distill_jax.data.loader import latents_of, videos_of
from greedy_distill_jax.data.sources.moving_shapes import is_shapes
from greedy_distill_jax.data.sources.protocol import VideoSource
from greedy_distill_jax.data.sources.registry import load_source
from greedy_distill_jax.errors import UserError
from greedy_distill_jax.runs.run import Run, data_source
from greedy_distill_jax.streaming.refresh import refreshed_stream
from greedy_distill_jax.streaming.session import programs


def held_out_videos(run: Run, frames: int, count: int, seed: int) -> tuple[UInt8[np.ndarray, "V T H W 3"], list[str]]:
    """Returns real videos of captions that the run was not trained on, and the captions.

    Args:
      run: whose data are drawn.
      frames: of a video; clips have a length of their own.
      count: videos at most.
      seed: of the draw.

    Raises:
      UserError: the data have no held-out windows.
    """
    source, codec = data_source(run.settings, "held_out", frames=frames, seed=seed)
    _check_some(source, run.settings.data.source)
    examples = [source[i] for i in range(min(count, len(source)))]
    return videos_of(examples, codec), [e["caption"] for e in examples]


def held_out_shape(run: Run, data: str) -> tuple[int, ...]:
    """Latent shape (T, h, w, C) of the held-out examples of other data than the run's, as long as they are there.

    Args:
      run: whose codec encodes videos that come without one; moving shapes are drawn as long as its own examples.
      data: as ``config.data.source``.

    Raises:
      UserError: data that cannot be read, without held-out windows, or without videos.
    """
    own = run.settings.data
    drawn = dict(size=own.size, frames=own.frames) if is_shapes(data) else {}
    source, codec = load_source(data, "held_out", **drawn)
    _check_some(source, data)
    example = source[0]
    if not {"latents", "video"} & set(example):
        raise UserError(f"{data} holds no videos; name data with videos, such as latents:DIR of `prepare latents`.")
    return latents_of([example], codec or run.codec).shape[1:]


def _check_some(source: VideoSource, data: str) -> None:
    if not len(source):
        raise UserError(f"{data} has no held-out windows; prepare it again with a held-out share above 0.")


def sampled(
    run: Run, captions: Sequence[str], *, batch: int = 256, seed: int = 0, **options
) -> UInt8[np.ndarray, "V T H W 3"]:
    """Samples one video per caption in batches.

    Args:
      run: of a teacher or a student.
      captions: the prompts.
      batch: videos at a time, each with noise of its own, because captions repeat; batch i has the seed
        ``seed`` + i * ``batch``.
      seed: of the noise.
      **options: of ``run.sample_videos``, such as frames and steps.
    """
    starts = range(0, len(captions), batch)
    return np.concatenate(
        [run.sample_videos(captions[i : i + batch], seed=jax.random.key(seed + i), **options) for i in starts]
    )


def refreshed(
    run: Run,
    captions: Sequence[str],
    real_VTHWC: Float32[np.ndarray, "V _T _H _W C"],
    *,
    start: int,
    keep: int,
    steps: Any,
    redraw: Callable[[np.ndarray, slice], np.ndarray] | None = None,
    batch: int = 256,
    seed: int = 0,
) -> UInt8[np.ndarray, "V T H W 3"]:
    """Streams on real history: as ``sampled``, with the same noise.

    Args:
      run: of a student.
      captions: the prompts.
      real_VTHWC: latents of real videos of these captions.
      start, keep: of ``refreshed_stream``.
      steps: as for ``Run.streamer``.
      redraw: ``redraw(frames of video of some videos, which ones) -> real frames`` in the place of these; None for the
        real videos' own.
      batch, seed: of ``sampled``.
    """
    streamer, parts = run.streamer(steps), []
    for i in range(0, len(captions), batch):
        part = slice(i, i + batch)

        def redrawn(x0, part=part):
            return run.codec.encode(redraw(run.codec.decode(x0), part))

        state = programs(streamer).init(
            run.params, run.text(captions[part]), jax.random.key(seed + i), real_VTHWC.shape[2:]
        )
        latents = refreshed_stream(
            streamer,
            run.params,
            state,
            real_VTHWC[part],
            start=start,
            keep=keep,
            redraw=redraw and redrawn,
        )
        parts.append(run.codec.decode(latents))
    return np.concatenate(parts)
