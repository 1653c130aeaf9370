"""Whether a folder can be written, and what a disk said, from the errors of libraries that write and read it."""

import errno
import os
import re
import tempfile

from greedy_distill_jax.errors import UserError

OF_DAMAGE = (errno.ENOENT, errno.EISDIR, errno.ENOTDIR, errno.EIO)  # the disk works, what is on it does not


def absolute(directory: str | os.PathLike) -> str:
    """The path from the root on; of another file system (`scheme://`) as it is."""
    directory = os.fspath(directory)
    return directory if "://" in directory else os.path.abspath(os.path.expanduser(directory))


def disk_reason(error: BaseException | None, but: tuple[int, ...] = ()) -> str:
    """Returns what the system said that is behind an error of a library; "" if it is not about the disk.

    Args:
      error: with its causes; TensorStore and safetensors have the number in their text.
      but: numbers that do not count.
    """
    while error is not None:
        told = re.search(r"os[ _]error(?:_code=')? ?(\d+)", str(error))
        number = int(told[1]) if told else error.errno if isinstance(error, OSError) else None
        if number and number not in but:
            return os.strerror(number)
        error = error.__cause__ or error.__context__
    return ""


def check_writable(directory: str | os.PathLike, field: str = "") -> None:
    """Makes a folder, if it is not there; UserError, about ``field``, if it cannot be made or written."""
    try:
        os.makedirs(directory, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{directory} cannot be written ({reason}); choose another directory.", field) from error
