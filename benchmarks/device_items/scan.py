"""What streams are checked against on a GPU: the same programs with every attention by XLA's scan over blocks."""

import contextlib
from collections.abc import Iterator

from greedy_distill_jax.ops.attention import backends
from greedy_distill_jax.ops.attention.backends import reference, xla


@contextlib.contextmanager
def by_scan() -> Iterator[None]:
    """What is traced meanwhile attends in plain XLA."""
    before = backends.BACKENDS
    backends.BACKENDS = (xla.BACKEND, reference.BACKEND)
    try:
        yield
    finally:
        backends.BACKENDS = before
