"""What started this process, as one of how many: told from the environment alone, before anything of jax starts.

Where jax's own cluster detection knows a launcher (``cluster_detection_method`` of ``jax.distributed.initialize``),
the arguments that it finds are left to it; where it does not, or takes one card of several, they are given here.
"""

import re
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from greedy_distill_jax.cli.variables import number
from greedy_distill_jax.distribution.hosts.cards import Cards, own_cards, visible_cards
from greedy_distill_jax.errors import UserError

ADDRESS, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
_SRUN = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID")  # what srun gives every process
_OMPI = "OMPI_COMM_WORLD"
_JOB_INDEX = "JOB_COMPLETION_INDEX"  # of an indexed Job of Kubernetes, as those of a JobSet are
_SLICE = ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES")  # that GKE gives the pods of a slice of TPUs
_GOOGLE = "0x1ae0"  # vendor of TPUs on the PCI bus


class Local(NamedTuple):
    """A process on its host.

    rank: its number there. count: how many are there, 0 where nobody says. elsewhere: whether others are. cards: that
    its launcher gave it alone, 0 where nobody says.
    """

    rank: int
    count: int
    elsewhere: bool
    cards: int = 0


class Found(NamedTuple):
    """What started a process.

    source: in words. arguments: of ``jax.distributed.initialize``. local: None where nobody says. cards: of this
    process, None where it is to use what it finds. several_hosts: whether there are, False where nobody says.
    """

    source: str
    arguments: dict[str, Any]
    local: Local | None = None
    cards: Cards | None = None
    several_hosts: bool = False


def find(environment: Mapping[str, str], root: Path = Path("/")) -> Found | None:
    """What this environment says of the job that a process belongs to; None for a process alone.

    The innermost launcher counts: explicit variables of jax, then torchrun, mpirun, srun, variables in torchrun's
    style, a slice of TPUs, an indexed Job of Kubernetes. JAX_NUM_PROCESSES=1 is a process alone.

    Args:
      environment: variables by name.
      root: folder of ``dev``, ``proc`` and ``sys``.

    Raises:
      UserError: which variable is missing or wrong.
    """
    given = {name: environment[name] for name in (ADDRESS, COUNT, INDEX) if environment.get(name)}
    if COUNT in given and number(given, COUNT, 1, least=1) == 1:
        return None
    found = _explicit(given, environment) if given else _launched(environment, root)
    if found is None or found.source.startswith("TPU"):  # jax gives every process of a slice its chips
        return found
    local, chosen = _local(environment), environment.get("JAX_LOCAL_DEVICE_IDS", "")
    visible = visible_cards(environment, root)
    # Those of its neighbours are visible beside its own only where SLURM binds none to tasks (--gpu-bind=none).
    alone = visible is not None and local is not None and len(visible) <= local.cards
    cards = own_cards(visible, None if alone else local, chosen)
    if cards is not None:
        found.arguments["local_device_ids"] = list(cards.own)
    return found._replace(local=local, cards=cards, several_hosts=local is not None and local.elsewhere)


def _explicit(given: Mapping[str, str], environment: Mapping[str, str]) -> Found:
    if ADDRESS not in given:
        others = f", and {COUNT}" if COUNT not in given else f", and {INDEX}" if INDEX not in given else ""
        raise UserError(
            f"{' and '.join(given)} without {ADDRESS}; set it to HOST:PORT of process 0, in all processes{others}"
        )
    host, _, port = given[ADDRESS].rpartition(":")
    if not host or not port.isdecimal():
        raise UserError(f"{ADDRESS} is {given[ADDRESS]!r}; it must be HOST:PORT of process 0, such as node1:1234")
    if COUNT in given and INDEX not in given and environment.get(_JOB_INDEX):
        given = {**given, INDEX: environment[_JOB_INDEX]}
    if COUNT in given and INDEX in given:
        return _numbered(f"{ADDRESS}", given[ADDRESS], given, COUNT, INDEX)
    if COUNT in given or INDEX in given:
        there, missing = (COUNT, INDEX) if COUNT in given else (INDEX, COUNT)
        raise UserError(f"{ADDRESS} and {there} are set, {missing} is not; set it, too")
    if environment.get(f"{_OMPI}_SIZE"):  # jax does not know Open MPI 5
        return _numbered("Open MPI", given[ADDRESS], environment, f"{_OMPI}_SIZE", f"{_OMPI}_RANK")
    missing = "SLURM_NTASKS" in environment and _missing_of_srun(environment)
    if missing:
        raise UserError(
            f"{ADDRESS} is set, but {COUNT} and {INDEX} are not, and srun has not started this process ({missing}); "
            f"set both, or start it with srun"
        )
    return Found(f"{ADDRESS}", {"coordinator_address": given[ADDRESS]})


def _launched(environment: Mapping[str, str], root: Path) -> Found | None:
    if environment.get("TORCHELASTIC_RUN_ID"):
        return _torchrun(environment)
    if environment.get(f"{_OMPI}_SIZE"):
        return _open_mpi(environment)
    if (tasks := number(environment, "SLURM_NTASKS", 1, least=1)) > 1:
        return _slurm(environment, tasks)
    if number(environment, "WORLD_SIZE", 1, least=1) > 1:
        return _torchrun(environment)
    for name in _SLICE:
        if environment.get(name):
            # Of several slices each names its own hosts alone.
            several = "," in environment[name] or number(environment, "MEGASCALE_NUM_SLICES", 1, least=1) > 1
            return Found(f"TPU slice of GKE ({name})", {"cluster_detection_method": "gketpu"}) if several else None
    if "TPU_SKIP_MDS_QUERY" not in environment and _has_tpu(root):
        return Found("TPU VM (metadata server)", {"cluster_detection_method": "gcetpu"})
    if environment.get(_JOB_INDEX):
        return _indexed_job()
    return None


def _torchrun(environment: Mapping[str, str]) -> Found | None:
    needed = ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE")
    missing = [name for name in needed if not environment.get(name)]
    if missing:
        raise UserError(f"WORLD_SIZE is set, {missing[0]} is not; set {', '.join(needed)}, or {COUNT}=1 for one alone")
    if number(environment, "WORLD_SIZE", 1, least=1) == 1:
        return None
    port = number(environment, "MASTER_PORT", 1, least=1)
    # torchrun itself listens at its port then.
    port += environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return _numbered("MASTER_ADDR", f"{environment['MASTER_ADDR']}:{port}", environment, "WORLD_SIZE", "RANK")


def _open_mpi(environment: Mapping[str, str]) -> Found | None:
    if number(environment, f"{_OMPI}_SIZE", 1, least=1) == 1:
        return None
    if environment.get("OMPI_MCA_orte_hnp_uri"):
        return Found("Open MPI", {"cluster_detection_method": "ompi"})
    if find_spec("mpi4py"):
        return Found("Open MPI (mpi4py)", {"cluster_detection_method": "mpi4py"})
    raise UserError(
        f"Open MPI 5 does not say at which host process 0 is; set {ADDRESS} to HOST:PORT of it (mpirun -x {ADDRESS}), "
        f"or install mpi4py"
    )


def _slurm(environment: Mapping[str, str], tasks: int) -> Found:
    if missing := _missing_of_srun(environment):
        raise UserError(
            f"SLURM gives this job {tasks} tasks (SLURM_NTASKS), but srun has not started this process as one of them "
            f"({missing}); start it with srun, or set {COUNT}=1 for a process alone, or {ADDRESS}, {COUNT} and {INDEX}"
        )
    return Found("SLURM", {"cluster_detection_method": "slurm"})


def _indexed_job() -> Found:
    if find_spec("kubernetes"):
        return Found("Kubernetes", {})  # its method has no name
    raise UserError(
        f"{_JOB_INDEX} is set: this is one pod of an indexed Job; set {ADDRESS} to HOST:PORT of pod 0 and {COUNT} in "
        f"all of them (1 for a process alone), or pip install 'jax[k8s]', which asks the cluster"
    )


def _numbered(source: str, address: str, environment: Mapping[str, str], count: str, index: str) -> Found:
    total, rank = number(environment, count, 1, least=1), number(environment, index, 0)
    if rank >= total:
        raise UserError(f"{index} is {rank} of {count} = {total}; it must be from 0 to {total - 1}")
    arguments = {"coordinator_address": address, "num_processes": total, "process_id": rank}
    return Found(source, arguments | {"cluster_detection_method": "deactivate"})


def _missing_of_srun(environment: Mapping[str, str]) -> str:
    """What shows that a process with SLURM's variables is none that srun started as one of several; "" if it is."""
    missing = [name for name in _SRUN if not environment.get(name)]
    if missing:
        return f"{missing[0]} is not set"
    # A shell that salloc opens on a node is a step of one task in a job of several.
    if environment.get("SLURM_STEP_NUM_TASKS") == "1" and number(environment, "SLURM_NTASKS", 1, least=1) > 1:
        return "SLURM_STEP_NUM_TASKS is 1"
    return ""


def _local(environment: Mapping[str, str]) -> Local | None:
    """Of the innermost launcher that says it."""
    if environment.get("LOCAL_RANK") and environment.get("WORLD_SIZE"):
        names = "LOCAL_RANK", "LOCAL_WORLD_SIZE", "WORLD_SIZE"
    elif environment.get(f"{_OMPI}_LOCAL_RANK"):
        names = f"{_OMPI}_LOCAL_RANK", f"{_OMPI}_LOCAL_SIZE", f"{_OMPI}_SIZE"
    elif (tasks := number(environment, "SLURM_NTASKS", 1, least=1)) > 1 and not _missing_of_srun(environment):
        count = _tasks_of_node(environment)
        # NUMBER or TYPE:NUMBER, several with commas between.
        cards = [int(text) for text in re.findall(r"(\d+)(?:,|$)", environment.get("SLURM_GPUS_PER_TASK", ""))]
        return Local(number(environment, "SLURM_LOCALID", 0), count, 0 < count < tasks, sum(cards))
    else:
        return None
    rank, count, total = (number(environment, name, 0) for name in names)
    return Local(rank, count, 0 < count < total)


def _tasks_of_node(environment: Mapping[str, str]) -> int:
    """Tasks on this node: SLURM writes 8(x2),4 for two nodes of 8 and one of 4; 0 where it does not say."""
    text, node = environment.get("SLURM_STEP_TASKS_PER_NODE", ""), number(environment, "SLURM_NODEID", 0)
    counts = [int(n) for n, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", text) for _ in range(int(times or 1))]
    return counts[node] if node < len(counts) else 0


def _has_tpu(root: Path) -> bool:
    """Whether this machine has chips and the library for them."""
    if not find_spec("libtpu"):
        return False
    if list(root.glob("dev/accel*")):
        return True
    vendors = (path.read_text().strip() for path in root.glob("sys/bus/pci/devices/*/vendor"))
    return bool(list(root.glob("dev/vfio/[0-9]*"))) and _GOOGLE in vendors
