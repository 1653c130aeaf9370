"""What a disk said, from the errors of libraries that write and read it."""

import errno
import os
import re

OF_DAMAGE = (errno.ENOENT, errno.EISDIR, errno.ENOTDIR, errno.EIO)  # the disk works, what is on it does not


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
