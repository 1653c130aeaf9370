"""How every command ends: 0, one line and 2 for bad input, 4 for a diverged run, 130 for Ctrl-C, else a traceback.

75 is for what another start may cure: a process of the job that did not come, or is gone.

SIGTERM unwinds the stack, so that nothing half-written stays behind, and exits with 143; a training run saves and exits
with 0 instead, once it is set up (of several processes, once one has begun a step), or with STOPPED_EXIT_CODE, for
schedulers to which 0 means that the training is finished. A platform without a device and a
full disk are bad input too: one line, whoever met them first.
"""

import argparse
import contextlib
import errno
import inspect
import itertools
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, get_args

from greedy_distill_jax.cli import variables
from greedy_distill_jax.cli.signals import CODES, ending, leave
from greedy_distill_jax.errors import Diverged, Lost, Stopped, UserError
from greedy_distill_jax.ranges import complaint

RETRY = 75  # exit code: EX_TEMPFAIL of sysexits.h
STOPPED_CODE = "STOPPED_EXIT_CODE"  # variable: the exit code of a training that SIGTERM ended, 0 without it


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are one line, like every other error."""

    def error(self, message: str) -> NoReturn:
        """Raises UserError: the option, what is wrong with it, and where the options are listed."""
        raise UserError(f"{message.removeprefix('argument ')}; see {self.prog} --help")

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        """As argparse's, which makes an empty list of the value in ``--fps=--`` before Python 3.13."""
        given = sys.argv[1:] if args is None else list(args)
        for argument in given:
            option, _, value = argument.partition("=")
            if value == "--" and option.startswith("-"):
                self.error(f"argument {option}: it is --, which is no value")
        return super().parse_known_args(given, namespace)


def text(value: str) -> str:
    """The ``type`` of an option that takes words: bytes that are not UTF-8 would be noise to a network."""
    if not value.isascii() and any("\ud800" <= letter <= "\udfff" for letter in value):
        raise argparse.ArgumentTypeError(f"it is {value!a}, which is not UTF-8")
    return value


def number(hint: Any) -> Callable[[str], int | float]:
    """Returns the ``type`` of an option that takes a number which ``hint`` allows, such as ``ranges.Count``."""
    kind = int if get_args(hint)[0] is int else float

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
      SystemExit: always, except for an error that is not the user's, which keeps its traceback. After a signal a
        process of the command's own has ended by then (``signals.leave``).
    """
    is_process = getattr(main, "__module__", "") == "__main__"  # else somebody who imported the command goes on
    try:
        with ending():
            if argv is None and not _needs_argument(main):
                code = main()
            else:
                code = main(sys.argv[1:] if argv is None else list(argv))
            sys.stdout.flush()
    except SystemExit as error:
        if is_process and error.code in CODES.values():
            leave(error.code)
        raise
    except BaseException as error:
        code, line = outcome(error, argv)
        if code == 1:
            raise
        if isinstance(error, BrokenPipeError):
            sys.stderr.close()  # the reader of our output left, as in `... | head`
        elif line:
            _say(line)
    if is_process and code in CODES.values():
        leave(code)
    sys.exit(code or 0)


def outcome(error: BaseException, argv: Sequence[str] | None = None) -> tuple[int, str]:
    """(exit code, last line) of a command that this error ends; (1, "") where it keeps its traceback."""
    argv = sys.argv[1:] if argv is None else argv
    match error:
        case UserError():
            return 2, f"error: {' '.join(str(error).split())}"
        case Diverged():
            return 4, f"error: {error}"
        case Stopped():
            try:
                return stopped_code(os.environ), str(error)
            except UserError as wrong:
                return 2, f"error: {wrong} {error}"
        case Lost():
            return RETRY, f"error: {' '.join(str(error).split())}"
        case KeyboardInterrupt():
            return 130, "interrupted"
        case BrokenPipeError():
            return 141, ""
        case OSError(errno=errno.ENAMETOOLONG):  # whoever looked there first
            place = _option_of(str(error.filename), argv)
            return 2, f"error: {place}{error.filename} cannot be used ({error.strerror}); choose a shorter name."
        case OSError(errno=errno.ENOSPC | errno.EDQUOT):
            place = error.filename or "standard output"
            return 2, f"error: {place} cannot be written ({error.strerror}); free space."
        case RuntimeError() | AssertionError():
            if told := _unknown_home(error, argv) or (_is_about_the_platform(error) and _no_platform(error)):
                return 2, f"error: {told}"
    return 1, ""


def stopped_code(environment: Mapping[str, str]) -> int:
    """The exit code of a training that SIGTERM ended; UserError for a variable that says none."""
    return variables.number(environment, STOPPED_CODE, 0, most=255)


def _option_of(path: str, argv: Sequence[str]) -> str:
    """ "--workdir: " where that option's value begins as the path does, or it as the value; "" where none's does."""
    for before, argument in itertools.pairwise(["", *argv]):
        option, equals, value = argument.partition("=") if argument.startswith("-") else (before, "=", argument)
        if equals and value and option.startswith("-") and (path.startswith(value) or value.startswith(path)):
            return f"{option}: "
    return ""


def _is_about_the_platform(error: BaseException) -> bool:
    """Whether jax found no device: the error comes from where it starts its platforms, whoever asked first."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return (Path(frame.filename).name, frame.name) == ("xla_bridge.py", "backends")


def _unknown_home(error: BaseException, argv: Sequence[str]) -> str:
    """What is wrong with a path that begins with ~NAME, whoever looked there first; "" where the error is another."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    if (Path(frame.filename).name, frame.name) != ("pathlib.py", "expanduser"):
        return ""
    named = [argument for argument in argv if re.search(r"(^|[=:])~[^/]", argument)]
    return f"{named[0] if named else '~'}: there is no such user, whose home ~ would be; write the path out."


def _no_platform(error: BaseException) -> str:
    asked = os.environ.get("JAX_PLATFORMS", "")
    place = f"JAX_PLATFORMS={asked}" if asked else "JAX_PLATFORMS"
    reason = " ".join(str(error).split()) or "no plugin of it is installed, or it finds no device"
    return f"{place}: jax cannot start there ({reason}); set JAX_PLATFORMS=cpu, or install what the platform needs."


def _needs_argument(main: Callable[..., Any]) -> bool:
    return any(
        p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
        for p in inspect.signature(main).parameters.values()
    )


def _say(text: str) -> None:
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    print(text, file=sys.stderr, flush=True)
