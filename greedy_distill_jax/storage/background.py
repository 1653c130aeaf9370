"""Orbax handlers whose writes in the background tell of a failure at once.

Of several processes, Orbax's thread at the one that fails first waits for the others, whose threads wait for its part:
minutes pass before anybody is told.
"""

from collections.abc import Callable
from typing import Any


def telling(handler: Any, failed: Callable[[BaseException], None]) -> Any:
    """Returns the handler, which from now on calls ``failed``, in a thread, with what its writes raise."""
    save, finalize = handler.async_save, handler.finalize

    async def async_save(*args, **kwargs) -> list[Any]:
        return [_Told(written, failed) for written in await save(*args, **kwargs) or ()]

    def finalized(directory: Any) -> None:
        try:
            finalize(directory)
        except BaseException as error:
            failed(error)
            raise

    handler.async_save, handler.finalize = async_save, finalized
    return handler


class _Told:
    """A future of Orbax."""

    def __init__(self, written: Any, failed: Callable[[BaseException], None]):
        self._written, self._failed = written, failed

    def result(self, timeout: float | None = None) -> Any:
        try:
            return self._written.result(timeout=timeout)
        except BaseException as error:
            self._failed(error)
            raise

    def cancel(self) -> bool | None:
        return self._written.cancel()
