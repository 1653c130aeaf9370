"""Folders that have the name of a checkpoint's step and are none, or a damaged one: they stay, beside the others."""

import itertools
import os
import sys

from greedy_distill_jax.errors import UserError

WHOLE = (("state", "_METADATA"), ("meta", "metadata"))  # files of a step, without which it is not whole


def move_aside(directory: str, step: int) -> str:
    """Moves a step out of a local folder of checkpoints; returns where it is now. UserError if that cannot be."""
    beside = os.path.realpath(directory)  # of a link to another disk, on that disk
    names = (f"{beside}-damaged-{step}{f'.{n}' if n else ''}" for n in itertools.count())
    name = next(name for name in names if not os.path.exists(name))
    try:
        os.replace(os.path.join(directory, str(step)), name)
    except OSError as error:
        raise UserError(
            f"{directory}/{step} is damaged, and cannot be moved to {name} ({error.strerror}); move it out of that "
            f"folder, then run the same command again"
        ) from error
    return name


def move_parts_aside(directory: str) -> None:
    """Moves what is newer than the newest whole step and is none, as a copy that was cut off, with a warning.

    What is being written has another name; older parts are of steps that were being removed when the process died.
    """
    steps = sorted((int(name) for name in os.listdir(directory) if name.isdecimal()), reverse=True)
    for step in steps:
        path = os.path.join(directory, str(step))
        missing = ["/".join(file) for file in WHOLE if not os.path.exists(os.path.join(path, *file))]
        if not missing:
            break
        told = f"{directory} step {step} is not whole (it has no {missing[0]})"
        warn(f"{told}; it is passed over, and moved to {move_aside(directory, step)}")


def warn(told: str) -> None:
    """Says a warning."""
    print(f"warning: {told}", file=sys.stderr, flush=True)
