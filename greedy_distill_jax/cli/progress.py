"""A progress bar with an ETA that leaves out compilation."""

import sys
import time
from typing import Any

from tqdm import tqdm


def progress(total: int, initial: int = 0, desc: str = "", enabled: bool = True, *, unit: str = "step"):
    """A progress report with ETA: a bar on a terminal, else a plain line at most every 10 seconds.

    Args:
      total: final count.
      initial: count at the start (of a resumed run).
      desc: what is counted.
      enabled: False reports nothing (every process but the first).
      unit: name of what is counted.

    Returns:
      A context manager with `update(n, restart=False)`, `set_postfix(**values)` and `close()`. With `restart` (after a
      step that compiled, say) rate and ETA forget the time up to now.
    """
    if enabled and not sys.stderr.isatty():
        return _Lines(total, initial, desc, unit, every=10.0)
    return _Bar(total=total, initial=initial, desc=desc, disable=not enabled, dynamic_ncols=True, unit=unit)


class _Lines:
    """Progress where \\r bars would be noise (files, CI): one line at most every `every` seconds."""

    def __init__(self, total: int, initial: int, desc: str, unit: str, every: float):
        self.total, self.n, self.desc, self.unit, self._every = total, initial, desc, unit, every
        self._postfix, self._printed = "", -1
        self._start = self._last = time.monotonic()
        self._since = initial, self._start  # count and time that the rate starts from

    def update(self, n: int = 1, *, restart: bool = False) -> None:
        self.n += n
        if restart:
            self._since = self.n, time.monotonic()
        if time.monotonic() - self._last >= self._every:
            self._print()

    def set_postfix(self, **values: Any) -> None:
        self._postfix = "".join(f", {name}={value}" for name, value in values.items())

    def _print(self) -> None:
        self._last, self._printed = time.monotonic(), self.n
        done, elapsed = self.n - self._since[0], self._last - self._since[1]
        rate = f", {done / elapsed:.3g} {self.unit}/s" if elapsed > 0 and done else ""
        left = (self.total - self.n) * elapsed / done if done else 0.0
        eta = f", {tqdm.format_interval(left)} left" if 0 < self.n < self.total and done else ""
        spent = tqdm.format_interval(self._last - self._start)
        line = f"{self.desc}: {self.n}/{self.total} after {spent}{eta}{rate}{self._postfix}"
        print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._printed != self.n:
            self._print()

    def __enter__(self) -> "_Lines":
        return self

    def __exit__(self, *_) -> None:
        self.close()


class _Bar(tqdm):
    """tqdm's bar, whose rate can restart; the elapsed time restarts with it."""

    def update(self, n: int = 1, *, restart: bool = False) -> bool | None:
        if not restart or self.disable:
            return super().update(n)
        count, self.initial = self.n + n, 0
        self.reset()
        self.initial = self.n = self.last_print_n = count
        return self.refresh()
