"""What Orbax may log."""

import contextlib
import logging

from greedy_distill_jax.storage.disk import disk_reason


def say_only_news() -> None:
    """Keeps Orbax from logging disk errors, which `Checkpointer.save`, `wait` or `close` tell in one line."""
    logging.getLogger("absl").addFilter(_is_news)


@contextlib.contextmanager
def quiet():
    """Keeps Orbax from warning that a read-only directory is read-only."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _is_news(record: logging.LogRecord) -> bool:
    """Whether Orbax logs something else than a disk error."""
    error = record.exc_info[1] if record.exc_info else None
    return not disk_reason(error) and "os_error_code" not in record.getMessage()
