"""Types shared by every layer of the package."""


class UserError(ValueError):
    """Bad user input: a one-line message naming the value, the place and the remedy."""
