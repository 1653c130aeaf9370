"""The backends of the attention op, the preferred one first. A backend is one file here with one record, and a row."""

from greedy_distill_jax.errors import UserError
from greedy_distill_jax.ops.attention.backends import cudnn, mosaic_gpu, mosaic_tpu, reference, xla
from greedy_distill_jax.ops.attention.backends.record import Backend

# Where several can run the first is taken: kernels of a platform, then what runs everywhere; the definition comes last.
BACKENDS: tuple[Backend, ...] = (
    mosaic_tpu.BACKEND,
    mosaic_gpu.BACKEND,
    cudnn.BACKEND,
    xla.BACKEND,
    reference.BACKEND,
)


def register(backend: Backend) -> None:
    """Adds a backend from outside of the package in front of the others: where it can run, it is preferred.

    Raises:
      UserError: a backend of this name exists.
    """
    global BACKENDS
    if backend.name in names():
        raise UserError(f"a backend of the name {backend.name!r} exists; choose another name.", field="name")
    BACKENDS = (backend, *BACKENDS)


def names() -> tuple[str, ...]:
    """Names of all backends, the preferred one first."""
    return tuple(backend.name for backend in BACKENDS)
