"""Orbax handlers, and a commit of Orbax, which tell of a failure in the background at once.

Of several processes, Orbax's thread at the one that fails first waits for the others, whose threads wait for its part:
minutes pass before anybody is told.
"""

import time
from collections.abc import Callable
from typing import Any

from greedy_distill_jax.errors import Lost

PAUSE, LONGEST = 0.01, 1200.0  # seconds between two looks at a save, and of a wait for it: as long as Orbax's threads


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


def telling_commit(path: type, failed: Callable[[BaseException], None]) -> type:
    """Returns the kind of temporary path, which calls ``failed``, in a thread, with what its commit raises."""

    class Told(path):
        async def finalize(self) -> None:
            try:
                await super().finalize()
            except BaseException as error:
                failed(error)
                raise

    return Told


def wait_while(saving: Callable[[], bool], check: Callable[[], None], directory: str) -> None:
    """Waits for the save of a step, and calls ``check``, which raises what has failed, meanwhile.

    Raises:
      Lost: it does not end, as where another process does not write its part.
    """
    until = time.monotonic() + LONGEST
    while saving():
        check()
        if time.monotonic() > until:
            raise Lost(
                f"{directory}: the step before is not written by all processes in {LONGEST:.0f} s; look at the disk "
                f"and at the other processes, then run the same command again"
            )
        time.sleep(PAUSE)


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
