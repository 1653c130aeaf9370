"""Programs by other attention than a device's best: XLA's scan, which streams are checked against, and the kernels."""

import contextlib
from collections.abc import Iterator

import jax.numpy as jnp

from device_items.correctness import needs
from greedy_distill_jax.ops.attention import Pattern, backends
from greedy_distill_jax.ops.attention.backends import mosaic_gpu, reference, xla
from greedy_distill_jax.ops.attention.backends.record import Backend


@contextlib.contextmanager
def _with(chosen: tuple[Backend, ...]) -> Iterator[None]:
    before = backends.BACKENDS
    backends.BACKENDS = chosen
    try:
        yield
    finally:
        backends.BACKENDS = before


def by_scan():
    """What is traced meanwhile attends in plain XLA."""
    return _with((xla.BACKEND, reference.BACKEND))


def by_kernels():
    """What is traced meanwhile attends by the Hopper kernels wherever they can, measured to be the fastest or not.

    Raises:
      NotHere: this is no Hopper card.
    """
    needs(mosaic_gpu.BACKEND.name, jnp.zeros((1, 8, 1, 128), jnp.bfloat16), Pattern.full(1, 8))
    preferred = mosaic_gpu.preferred()
    return _with((preferred, *(b for b in backends.BACKENDS if b.name != preferred.name)))
