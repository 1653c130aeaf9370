"""How the processes of a job find each other, and what each prints of it."""

import contextlib
import ipaddress
import math
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax

from greedy_distill_jax import cli
from greedy_distill_jax.cli.signals import saying
from greedy_distill_jax.cli.variables import number
from greedy_distill_jax.distribution.agreement import coordinator, leave, place
from greedy_distill_jax.distribution.hosts.cards import cards_alone
from greedy_distill_jax.distribution.hosts.environment import ADDRESS, COUNT, INDEX, Found, find
from greedy_distill_jax.errors import Lost, UserError
from greedy_distill_jax.storage.records import first_line

TIMEOUT = "JOIN_TIMEOUT"  # variable: seconds in which all processes have to come
_SECONDS, _SILENCE = 300, 100  # seconds: the timeout without one; without a sign of life a process is dead to jax

_PAUSE = 0.5  # seconds between two looks for process 0, and of one
_SPARE = 30  # seconds that jax waits longer than this process


class Joined(NamedTuple):
    """This process among all of its job.

    process, processes: its number, and how many there are. source: what started them; "" for one alone. host: name.
    expected: devices that it is to have at least; 0 where nobody says. seconds: in which all have to come and answer.
    """

    process: int = 0
    processes: int = 1
    source: str = ""
    host: str = ""
    expected: int = 0
    seconds: int = _SECONDS


def join_hosts() -> Joined:
    """Joins the other processes of the job, if there are any, as ``environment.find`` says; prints one line then.

    Raises:
      UserError: what is missing or wrong in the environment.
      Lost: the others did not come.
    """
    host, seconds = socket.gethostname(), timeout(os.environ)
    found = None if jax.distributed.is_initialized() else find(os.environ)
    if found is None:
        least = 0 if jax.distributed.is_initialized() else _alone()
        return Joined(*place(), host=host, expected=least, seconds=seconds)
    if address := found.arguments.get("coordinator_address"):
        check_coordinator(address, found.several_hosts, host)
    _join(found, seconds)
    process, processes = place()
    if processes > 1:
        print(line(found, process, processes, host, coordinator(), seconds), file=sys.stderr, flush=True)
    return Joined(process, processes, found.source, host, expected(found, os.environ), seconds)


def share() -> tuple[int, int]:
    """(number of this process, how many there are), for work that needs no more of the others.

    It joins them, which gives each of several processes of a machine its devices, and leaves: at the exit of processes
    that have joined, each waits for the others, for minutes.

    Raises:
      UserError: what is missing or wrong in the environment.
      Lost: the others did not come.
    """
    joined = jax.distributed.is_initialized()
    found = join_hosts()
    if not joined:
        leave()
    return found.process, found.processes


def check_joined() -> None:
    """Raises UserError when this is one of several processes, as on a slice of TPUs, that do not know each other."""
    if jax.process_count() > 1 and not jax.distributed.is_initialized():
        raise UserError(
            f"this is one of {jax.process_count()} processes, which have not joined; set {ADDRESS} to HOST:PORT of the "
            f"first one, in all of them"
        )


def check_coordinator(address: str, several_hosts: bool, host: str, resolve: Callable = socket.getaddrinfo) -> None:
    """Raises UserError for an address that each of several hosts takes for itself.

    Args:
      address: HOST:PORT of process 0.
      several_hosts: whether there are.
      host: name of this one, which may know itself by a loopback address.
      resolve: as ``socket.getaddrinfo``.
    """
    name = address.rpartition(":")[0].strip("[]")
    if several_hosts and name not in (host, host.partition(".")[0]) and (found := _loopback(name, resolve)):
        also = "" if found == name else f" resolves to {found}, which"
        raise UserError(
            f"the coordinator {address}{also} is the loopback address, at which every host finds itself, and there are "
            f"several hosts; give the name or address of process 0's host that the others reach"
        )


def line(found: Found, process: int, processes: int, host: str, address: str, seconds: int) -> str:
    """What a process prints once it has joined."""
    devices = "all that it has"
    if cards := found.cards:
        named = ", ".join(cards.names)
        devices = f"{'card' if len(cards.own) == 1 else 'cards'} {named} of {cards.visible} visible"
    return (
        f"process {process} of {processes} on {host}: {found.source}, coordinator {address}, devices: {devices}; "
        f"timeout {seconds} s ({TIMEOUT}), lost after {_SILENCE} s of silence"
    )


def timeout(environment: Mapping[str, str]) -> int:
    """Seconds in which all processes have to come; UserError for a variable that is no number."""
    return number(environment, TIMEOUT, _SECONDS, least=1, of=" of seconds,")


def expected(found: Found, environment: Mapping[str, str]) -> int:
    """Devices that a process is to have at least: its cards, or the chips of its host; 0 where nobody says."""
    if found.cards:
        return len(found.cards.own)
    bounds = environment.get("TPU_CHIPS_PER_PROCESS_BOUNDS") or environment.get("TPU_CHIPS_PER_HOST_BOUNDS") or ""
    sizes = bounds.split(",")
    if not found.source.startswith("TPU") or not all(size.isdecimal() for size in sizes):
        return 0
    return math.prod(map(int, sizes))


def check_devices(joined: Joined, seen: int, kind: str) -> None:
    """Looks for a process with fewer devices than it is to have, such as cards that jax cannot use.

    Raises:
      UserError: one of several processes has fewer than its launcher gave it. One alone goes on with a warning, as on a
        machine whose card is for its screen.
    """
    if (seen := counted(joined, seen, kind)) >= joined.expected:
        return
    told = (
        f"process {joined.process} ({joined.host}) has {seen} of {joined.expected} devices ({kind}); install the "
        f"build of jax for them, look at the host, or set JAX_PLATFORMS=cpu to do without"
    )
    if joined.processes > 1:
        raise UserError(told)
    print(f"warning: {told}", file=sys.stderr, flush=True)


def counted(joined: Joined, seen: int, kind: str) -> int:
    """How many of the devices that jax has are such as the process is to have: none if it went back to the CPU."""
    return 0 if joined.expected and kind == "cpu" else seen


def _loopback(name: str, resolve: Callable) -> str:
    """The loopback address that a name stands for, "" where it does for another one too, or is not known."""
    try:
        found = {entry[4][0].partition("%")[0] for entry in resolve(name, None)}
    except OSError:
        return ""
    return min(found) if found and all(ipaddress.ip_address(address).is_loopback for address in found) else ""


def _alone() -> int:
    """Takes the cards that a process alone is to use; returns how many devices it is to have at least."""
    environment = {**os.environ, "JAX_PLATFORMS": jax.config.jax_platforms or ""}
    cards, least = cards_alone(environment)
    if cards and environment.get("JAX_LOCAL_DEVICE_IDS"):  # jax itself reads it for several processes only
        jax.config.update("jax_cuda_visible_devices", ",".join(map(str, cards.own)))
    return least


def _join(found: Found, seconds: int) -> None:
    # Its service takes SIGTERM away from Python, to ask for a checkpoint in a way that knows no Ctrl-C.
    jax.config.update("jax_enable_preemption_service", False)
    where = found.arguments.get("coordinator_address", "the first of the job")
    until = time.monotonic() + seconds
    stopped = f"stopped while waiting for the other processes, at {where}"
    if found.arguments.get("process_id") and "coordinator_address" in found.arguments:
        with saying(stopped):
            _wait_for_first(found, until, seconds)
    left = max(1, round(until - time.monotonic()))  # jax takes whole seconds
    limits: dict[str, Any] = {"initialization_timeout": left + _SPARE, "heartbeat_timeout_seconds": _SILENCE}
    try:
        with saying(stopped), _ended_after(left, lambda: Lost(_did_not_come(found, seconds, "some are missing"))):
            jax.distributed.initialize(**found.arguments, **limits)
    except ValueError as error:
        raise UserError(
            f"jax does not find how many processes there are and which this is ({first_line(error)[:200]}); set "
            f"{COUNT} and {INDEX} beside {ADDRESS}"
        ) from error
    except jax.errors.JaxRuntimeError as error:
        raise Lost(_did_not_come(found, seconds, first_line(error)[:200])) from error
    except (RuntimeError, OSError) as error:  # of jax's detection: a metadata server or a cluster that does not answer
        raise UserError(
            f"jax cannot ask who the other processes are ({found.source}: {first_line(error)[:200]}); set {ADDRESS}, "
            f"{COUNT} and {INDEX}, or {COUNT}=1 for a process alone"
        ) from error


@contextlib.contextmanager
def _ended_after(seconds: int, error: Callable[[], Exception]) -> Iterator[None]:
    """Ends the process as ``error()`` would if the block takes longer; jax would abort it, with a stack of C++."""
    done = threading.Event()

    def wait() -> None:
        if not done.wait(seconds):
            code, line = cli.outcome(error())
            print(line, file=sys.stderr, flush=True)
            os._exit(code)

    threading.Thread(target=wait, daemon=True).start()
    try:
        yield
    finally:
        done.set()


def _wait_for_first(found: Found, until: float, seconds: int) -> None:
    """Waits until process 0 listens; Lost if it does not in time, of which jax would abort with a stack of C++."""
    name, _, port = found.arguments["coordinator_address"].rpartition(":")
    while True:
        try:
            socket.create_connection((name.strip("[]"), int(port)), timeout=_PAUSE).close()
            return
        except OSError as error:
            if time.monotonic() > until:
                raise Lost(_did_not_come(found, seconds, error.strerror or str(error))) from error
        time.sleep(_PAUSE)


def _did_not_come(found: Found, seconds: int, reason: str) -> str:
    where = coordinator() or found.arguments.get("coordinator_address", "the first of the job")
    loopback = _loopback(where.rpartition(":")[0].strip("[]"), socket.getaddrinfo)
    hint = f"; at {loopback} every host finds itself, so give another address if there are several" * bool(loopback)
    return f"the other processes, at {where}, did not come within {seconds} s ({found.source}; {reason}){hint}"
