"""Types shared by every layer of the package."""


class UserError(ValueError):
    """Bad user input: a one-line message naming the value, the place and the remedy. Commands exit with 2."""


class Diverged(RuntimeError):
    """A loss, a gradient or a parameter is not finite; the last good checkpoint is kept. Commands exit with 4."""


class Stopped(RuntimeError):
    """SIGTERM ended the work early; what was done is saved and the same command goes on. Commands exit with 0."""
