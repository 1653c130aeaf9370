"""Judging: every reward is asked, what it returns is checked, and a fault of one video is NaN for that video."""

import concurrent.futures
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32

from greedy_distill_jax.cli import extensions
from greedy_distill_jax.errors import UserError
from greedy_distill_jax.losses import is_number
from greedy_distill_jax.rewards.protocol import HostView, Judged, RewardTerm, View

FAILED = ("mask", "stop")


def start(terms: Sequence[RewardTerm]) -> None:
    """Raises UserError for a reward that cannot be asked, such as one whose server does not answer."""
    for term in terms:
        if term.reward.ready is not None:
            try:
                term.reward.ready({**extensions.defaults(term.reward.function), **term.options})
            except UserError as error:
                raise UserError(f"{term.told}: {error}") from error


def on_device(terms: Sequence[RewardTerm], view: View) -> dict[str, Float32[Array, " B"]]:
    """The values of the terms of kind "jax" by name; pure, for use inside jit.

    A value that is not finite or out of its bounds is NaN, without a gradient.

    Raises:
      UserError: a reward returned something else than one number per video.
    """
    values = {}
    for term in terms:
        if term.reward.kind == "jax":
            value = term.reward(view, **term.options)
            _check_form(term, term.name, value, len(view.video_BTHWC))
            value = value.astype(jnp.float32)
            values[term.name] = jnp.where(_allowed(term, value), value, jnp.float32(jnp.nan))
    return values


def on_host(
    terms: Sequence[RewardTerm], view: HostView, *, failed: str = "mask"
) -> dict[str, Float32[np.ndarray, " B"]]:
    """The values of the terms of kind "host" and "http" by name; a reward with several values has "name/value".

    Servers are asked all at once, and host rewards run meanwhile, one after another.

    Args:
      terms: rewards; those of kind "jax" are passed over.
      view: the videos of this process.
      failed: "mask" makes a value that is missing, not finite or out of its bounds NaN and warns, "stop" raises.

    Raises:
      UserError: a reward returned something else than one number per video; with "stop", a fault of any video. What a
        reward's own code raises passes as it is.
    """
    if failed not in FAILED:
        raise UserError(f"failed is {failed!r}; it must be one of {', '.join(FAILED)}.", "failed")
    terms = [term for term in terms if term.reward.kind != "jax"]
    asked = [term for term in terms if term.reward.kind == "http"]
    found: dict[str, Any] = {}
    with concurrent.futures.ThreadPoolExecutor(max(1, len(asked))) as pool:
        waiting = {term.name: pool.submit(term.reward, view, **term.options) for term in asked}
        for term in terms:
            if term.name not in waiting:
                found[term.name] = term.reward(view, **term.options)
        found.update({name: future.result() for name, future in waiting.items()})
    return {name: value for term in terms for name, value in _checked(term, found[term.name], view, failed).items()}


def weights(terms: Sequence[RewardTerm], values: Mapping[str, Any]) -> dict[str, float]:
    """{name: weight} of the values that are optimised: each of a reward's several values has the weight of its term,
    and those of judges are not among them."""
    of = {term.name: term for term in terms}
    named = {name: of[name.partition("/")[0]] for name in values}
    return {name: term.weight for name, term in named.items() if not term.judge}


def statistics(values: Mapping[str, Float[Array | np.ndarray, " B"]]) -> dict[str, Float32[Array, ""]]:
    """Mean, std, min and max of every reward over the videos that have a value, and the share "nan" of those without.

    Where no video has one, only that share is a number.
    """
    of = {"mean": jnp.nanmean, "std": jnp.nanstd, "min": jnp.nanmin, "max": jnp.nanmax, "nan": _share_missing}
    return {f"{name}/{key}": function(jnp.asarray(x)) for name, x in values.items() for key, function in of.items()}


def _share_missing(values: Float[Array, " B"]) -> Float32[Array, ""]:
    return jnp.mean(jnp.isnan(values).astype(jnp.float32))


def _allowed(term: RewardTerm, values: Any) -> Bool[Array | np.ndarray, " B"]:
    """Comparisons with NaN are false, and a bound may be infinite, a value not."""
    return (values >= term.low) & (values <= term.high) & (abs(values) < np.inf)


def _check_form(term: RewardTerm, name: str, value: Any, videos: int) -> None:
    if not is_number(value, (videos,)):
        shaped = hasattr(value, "shape") and hasattr(value, "dtype")
        held = f"{value.dtype}{list(value.shape)}" if shaped else f"a {type(value).__name__}"
        of = "" if name == term.name else f" as {name}"
        raise UserError(
            f"{term.told}: the reward returned {held}{of} for {videos} videos; return one number per video, shape "
            f"[{videos}]."
        )


def _checked(term: RewardTerm, returned: Any, view: HostView, failed: str) -> dict[str, Float32[np.ndarray, " B"]]:
    """{name: values} of what a host reward returned, with NaN for every fault."""
    videos = len(view.video_BTHWC)
    returned, faults = returned if isinstance(returned, Judged) else (returned, ())
    several = isinstance(returned, Mapping)
    named = {f"{term.name}/{key}": x for key, x in returned.items()} if several else {term.name: returned}
    values, lines = {}, list(faults)
    for name, value in named.items():
        _check_form(term, name, value, videos)
        with np.errstate(over="ignore"):  # what float32 does not hold is a fault as well
            value = np.asarray(value).astype(np.float32)
        allowed = _allowed(term, value)
        outside = value[~allowed & ~np.isnan(value)]
        if len(outside):
            lines.append(f"{name} is {outside[0]:g}, outside [{term.low:g}, {term.high:g}]")
        values[name] = np.where(allowed, value, np.float32(np.nan))
    missing = int(np.any([np.isnan(value) for value in values.values()], axis=0).sum())
    if missing:
        why = "; ".join(dict.fromkeys(lines)) or "the reward gave NaN"
        line = f"{term.told}: {missing} of {videos} videos are not judged ({why})"
        if failed == "stop":
            raise UserError(f"{line}; mend that, or leave such videos out with failed=mask.")
        warnings.warn(f"{line}; they are left out.")
    return values
