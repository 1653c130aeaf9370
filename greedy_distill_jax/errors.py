"""The errors every layer of the package shares."""

import contextlib
from collections.abc import Iterator, Mapping


class UserError(ValueError):
    """Bad user input: one line that names the value, the place and the remedy. Commands exit with 2.

    A library knows the field that holds the value, not where the user wrote it. Whoever knows says so with ``at``:
    commands put the option in front, the configuration its key.

    Attributes:
      field: name of the argument or dataclass field, "" where there is none or its place is told already.
    """

    def __init__(self, message: str, field: str = ""):
        super().__init__(message)
        self.field = field

    def at(self, places: Mapping[str, str]) -> "UserError":
        """The same error with the place of its field in front, if ``places`` (field -> place) has it."""
        place = places.get(self.field)
        return UserError(f"{place}: {self}") if place else self


@contextlib.contextmanager
def about(field: str) -> Iterator[None]:
    """Errors of a library that is handed one of our arguments are about that argument: ``about("codec")``."""
    try:
        yield
    except UserError as error:
        raise UserError(str(error), field) from error


class Diverged(RuntimeError):
    """A loss, a gradient or a parameter is not finite; the last good checkpoint is kept. Commands exit with 4."""


class Lost(RuntimeError):
    """Another process of the job did not come or does not answer, or one that is gone still has its folder locked.

    Commands exit with 75: the same command goes on.
    """


class Stopped(RuntimeError):
    """SIGTERM ended the work early; what was done is saved and the same command goes on. Commands exit with 0."""
