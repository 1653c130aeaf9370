"""Sources by name: what a data specification such as "clips:DIR" opens, and how to add a source of your own."""

from __future__ import annotations

from collections.abc import Callable

from greedy_distill_jax.codecs.protocol import VideoCodec
from greedy_distill_jax.data.sources.clips import open_clips
from greedy_distill_jax.data.sources.latents import open_latents
from greedy_distill_jax.data.sources.moving_shapes import open_moving_shapes
from greedy_distill_jax.data.sources.prompts import open_prompts
from greedy_distill_jax.data.sources.protocol import VideoSource
from greedy_distill_jax.data.sources.trajectories import open_trajectories
from greedy_distill_jax.errors import UserError, about

# opener(argument, *, split, size, frames, seed) -> (source, codec), as in `load_source`.
Opener = Callable[..., tuple[VideoSource, VideoCodec | None]]

# How a specification is written -> what opens it; in brackets what may be left out.
_OPENERS: dict[str, tuple[str, Opener]] = {
    "moving_shapes": ("moving_shapes[:wandering]", open_moving_shapes),
    "clips": ("clips:DIR", open_clips),
    "latents": ("latents:DIR", open_latents),
    "ode": ("ode:DIR", open_trajectories),
    "prompts": ("prompts:FILE", open_prompts),
}


def register(name: str, usage: str, opener: Opener | None = None):
    """Makes a source of your own available to `load_source`; usable as a decorator.

    Args:
      name: what stands before the colon.
      usage: the specification as users write it, such as "mine:DIR"; without brackets, what stands after the colon
        must be given.
      opener: ``opener(argument, *, split, size, frames, seed) -> (source, codec)``, where ``argument`` is what stands
        after the colon and the others are those of `load_source`.
    """
    if opener is None:
        return lambda function: register(name, usage, function)
    _OPENERS[name] = usage, opener
    return opener


def load_source(
    source: str, split: str = "train", *, size: int | None = None, frames: int | None = None, seed: int = 0
) -> tuple[VideoSource, VideoCodec | None]:
    """Opens the source and the codec that a data specification names.

    Args:
      source: "moving_shapes", "moving_shapes:wandering", "clips:DIR" with a folder written by `prepare clips`,
        "latents:DIR" with one by `prepare latents`, "ode:DIR" with one by `prepare ode`, "prompts:FILE" with a prompt a
        line, or "NAME:..." of a source given to `register`.
      split: "train" or "held_out", where the source has both.
      size, frames: of the videos (frames, and size in rows and columns, of latents where the source holds these); None
        for 16 and 8 (moving shapes) or for what the folder holds.
      seed: of the moving shapes. Their codec does not depend on it, nor on the split: it is fitted on a fixed sample.

    Returns:
      (source, codec); the codec is None where the source has only captions.

    Raises:
      UserError: an unknown specification, a folder that cannot be read, or one that does not hold this size or length.
    """
    name, _, argument = source.partition(":")
    usage, opener = _OPENERS.get(name, ("", None))
    if opener is None or (not argument and ":" in usage and "[" not in usage):
        known = ", ".join(usage for usage, _ in _OPENERS.values())
        raise UserError(f"data {source!r} is unknown; use one of {known}", field="source")
    with about("source"):
        opened = opener(argument, split=split, size=size, frames=frames, seed=seed)
    if not isinstance(opened, tuple) or len(opened) != 2 or not isinstance(opened[0], VideoSource):
        raise UserError(
            f"{source!r}: its opener returned a {type(opened).__name__}; return (source, codec), the source with a "
            f"length and examples by index, the codec None where there are only captions",
            field="source",
        )
    return opened
