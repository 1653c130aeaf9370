"""How the processes of a job find each other: by the variables of SLURM, by those of jax, or not at all."""

import os
from collections.abc import Mapping
from typing import Any

import jax

from greedy_distill_jax.cli.signals import saying
from greedy_distill_jax.distribution.agreement import leave, place
from greedy_distill_jax.errors import UserError
from greedy_distill_jax.storage.records import first_line

ADDRESS, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
_STEP = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID")  # what srun gives every process


def join_hosts() -> None:
    """Joins the other processes of the job, if there are any, as ``joining`` says.

    Raises:
      UserError: what is missing, or the others did not come.
    """
    arguments = None if jax.distributed.is_initialized() else joining(os.environ)
    if arguments is not None:
        _join(arguments)


def share() -> tuple[int, int]:
    """(number of this process, how many there are), for work that needs no more of the others.

    It joins them, which gives each of several processes of a machine its devices, and leaves: at the exit of processes
    that have joined, each waits for the others, for minutes.

    Raises:
      UserError: what is missing, or the others did not come.
    """
    joined = jax.distributed.is_initialized()
    join_hosts()
    found = place()
    if not joined:
        leave()
    return found


def check_joined() -> None:
    """Raises UserError when this is one of several processes, as on a slice of TPUs, that do not know each other."""
    if jax.process_count() > 1 and not jax.distributed.is_initialized():
        raise UserError(
            f"this is one of {jax.process_count()} processes, which have not joined; set {ADDRESS} to HOST:PORT of the "
            f"first one, in all of them"
        )


def joining(environment: Mapping[str, str]) -> dict[str, Any] | None:
    """What ``jax.distributed.initialize`` is to be called with in this environment; None for a process alone.

    JAX_COORDINATOR_ADDRESS goes with JAX_NUM_PROCESSES and JAX_PROCESS_ID, or with what srun, mpirun or a TPU slice
    say; without it the process is one of SLURM's, if srun started several. JAX_NUM_PROCESSES=1 is a process alone.

    Raises:
      UserError: which of them is missing or wrong.
    """
    given = {name: environment[name] for name in (ADDRESS, COUNT, INDEX) if environment.get(name)}
    if COUNT in given and _number(given, COUNT, 1) == 1:
        return None
    if ADDRESS in given:
        return _at_address(given, environment)
    if given:
        others = f", and {COUNT}" if COUNT not in given else f", and {INDEX}" if INDEX not in given else ""
        raise UserError(
            f"{' and '.join(given)} without {ADDRESS}; set it to HOST:PORT of process 0, in all processes{others}"
        )
    tasks = _number(environment, "SLURM_NTASKS", 1)
    if tasks == 1:
        return None
    missing = _missing_of_srun(environment)
    if missing:
        raise UserError(
            f"SLURM gives this job {tasks} tasks (SLURM_NTASKS), but srun has not started this process as one of them "
            f"({missing}); start it with srun, or set {COUNT}=1 for a process alone, or {ADDRESS}, {COUNT} and {INDEX}"
        )
    return {}


def _at_address(given: Mapping[str, str], environment: Mapping[str, str]) -> dict[str, Any]:
    host, _, port = given[ADDRESS].rpartition(":")
    if not host or not port.isdigit():
        raise UserError(f"{ADDRESS} is {given[ADDRESS]!r}; it must be HOST:PORT of process 0, such as node1:1234")
    if COUNT in given and INDEX in given:
        count, index = _number(given, COUNT, 1), _number(given, INDEX, 0)
        if index >= count:
            raise UserError(f"{INDEX} is {index} of {COUNT} = {count}; it must be from 0 to {count - 1}")
        return {"coordinator_address": given[ADDRESS], "num_processes": count, "process_id": index}
    if COUNT in given or INDEX in given:
        there, missing = (COUNT, INDEX) if COUNT in given else (INDEX, COUNT)
        raise UserError(f"{ADDRESS} and {there} are set, {missing} is not; set it, too")
    missing = "SLURM_NTASKS" in environment and _missing_of_srun(environment)
    if missing:
        raise UserError(
            f"{ADDRESS} is set, but {COUNT} and {INDEX} are not, and srun has not started this process ({missing}); "
            f"set both, or start it with srun"
        )
    return {"coordinator_address": given[ADDRESS]}


def _missing_of_srun(environment: Mapping[str, str]) -> str:
    """What shows that a process with SLURM's variables is none that srun started as one of several; "" if it is."""
    missing = [name for name in _STEP if not environment.get(name)]
    if missing:
        return f"{missing[0]} is not set"
    # A shell that salloc opens on a node is a step of one task in a job of several.
    if environment.get("SLURM_STEP_NUM_TASKS") == "1" and _number(environment, "SLURM_NTASKS", 1) > 1:
        return "SLURM_STEP_NUM_TASKS is 1"
    return ""


def _number(environment: Mapping[str, str], name: str, least: int) -> int:
    """The number of a variable, ``least`` without one."""
    text = environment.get(name) or str(least)
    if not text.isdigit() or int(text) < least:
        raise UserError(f"{name} is {text!r}; it must be a number from {least} on")
    return int(text)


def _join(arguments: Mapping[str, Any]) -> None:
    # Its service takes SIGTERM away from Python, to ask for a checkpoint in a way that knows no Ctrl-C.
    jax.config.update("jax_enable_preemption_service", False)
    where = arguments.get("coordinator_address", "the first of the job")
    try:
        with saying(f"stopped while waiting for the other processes, at {where}"):
            jax.distributed.initialize(**arguments)
    except ValueError as error:
        raise UserError(
            f"jax does not find how many processes there are and which this is ({first_line(error)[:200]}); set "
            f"{COUNT} and {INDEX} beside {ADDRESS}"
        ) from error
    except jax.errors.JaxRuntimeError as error:
        raise UserError(f"the other processes, at {where}, did not come ({first_line(error)[:200]})") from error
