"""Numbers in environment variables."""

from collections.abc import Mapping

from greedy_distill_jax.errors import UserError


def number(
    environment: Mapping[str, str], name: str, default: int, *, least: int = 0, most: int | None = None, of: str = ""
) -> int:
    """The whole number of a variable, ``default`` where it is not set or empty.

    Args:
      environment: variables by name.
      name: of the variable.
      default: without one.
      least, most: that it may be; None for no limit.
      of: what it counts, for the error, such as " of seconds,".

    Raises:
      UserError: it is no such number.
    """
    text = environment.get(name) or str(default)
    if not text.isdecimal() or int(text) < least or (most is not None and int(text) > most):
        limit = f"from {least} on" if most is None else f"from {least} to {most}"
        raise UserError(f"{name} is {text!r}; it must be a number{of} {limit}.")
    return int(text)
