"""How every command ends: 0, one line and 2 for bad input, 4 for a diverged run, 130 for Ctrl-C, else a traceback.

SIGTERM unwinds the stack, so that nothing half-written stays behind, and exits with 143; a training run saves and exits
with 0 instead.
"""

import argparse
import contextlib
import inspect
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn, get_args

from greedy_distill_jax.errors import Diverged, Stopped, UserError
from greedy_distill_jax.ranges import complaint


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are one line, like every other error."""

    def error(self, message: str) -> NoReturn:
        """Raises UserError: the option, what is wrong with it, and where the options are listed."""
        raise UserError(f"{message.removeprefix('argument ')}; see {self.prog} --help")


def number(hint: Any) -> Callable[[str], int | float]:
    """Returns the ``type`` of an option that takes a number which ``hint`` allows, such as ``ranges.Count``."""
    kind = get_args(hint)[0]

    def read(text: str) -> int | float:
        try:
            value = kind(text)
        except ValueError:
            value = text
        wrong = complaint(value, hint)
        if wrong:
            raise argparse.ArgumentTypeError(f"it is {text}; it must be {wrong}")
        return value

    return read


@contextlib.contextmanager
def places(**fields: str) -> Iterator[None]:
    """A UserError about one of these fields says which option it came from: ``places(frames="--frames")``."""
    try:
        yield
    except UserError as error:
        raise error.at(fields) from error


def run(main: Callable[..., Any], argv: Sequence[str] | None = None) -> NoReturn:
    """Calls `main()` (or `main(argv)` if `argv` is given) and exits the process.

    Args:
      main: returns None or an exit code.
      argv: arguments without the program's name; None lets `main` read `sys.argv` itself.

    Raises:
      SystemExit: always, except for an error that is not the user's, which keeps its traceback.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        if argv is None and not _needs_argument(main):
            code = main()
        else:
            code = main(sys.argv[1:] if argv is None else list(argv))
    except UserError as error:
        _say(f"error: {' '.join(str(error).split())}")
        code = 2
    except Diverged as error:
        _say(f"error: {error}")
        code = 4
    except Stopped as stopped:
        _say(str(stopped))
        code = 0
    except KeyboardInterrupt:
        _say("interrupted")
        code = 130
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our output left, as in `... | head`
        code = 141
    sys.exit(code or 0)


def _needs_argument(main: Callable[..., Any]) -> bool:
    return any(
        p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
        for p in inspect.signature(main).parameters.values()
    )


def _say(text: str) -> None:
    sys.stdout.flush()
    print(text, file=sys.stderr, flush=True)
