"""What a process finds of its job in the environment, which cards it takes, and what differs among processes."""

import json
import re
import socket
import subprocess
import sys
import threading
from types import SimpleNamespace

import jax
import pytest

from greedy_distill_jax import cli
from greedy_distill_jax.config import base, read_settings
from greedy_distill_jax.distribution.hosts import alike, environment, join
from greedy_distill_jax.distribution.hosts.cards import Cards, cards_alone, own_cards, visible_cards
from greedy_distill_jax.distribution.hosts.environment import Found, find
from greedy_distill_jax.distribution.hosts.join import Joined
from greedy_distill_jax.errors import Lost, UserError
from tests.distribution.test_agreement import FakeStore

SRUN = {
    "SLURM_JOB_ID": "7",
    "SLURM_NTASKS": "16",
    "SLURM_PROCID": "11",
    "SLURM_LOCALID": "3",
    "SLURM_NODEID": "1",
    "SLURM_STEP_NODELIST": "node[1-2]",
    "SLURM_STEP_NUM_TASKS": "16",
    "SLURM_STEP_TASKS_PER_NODE": "8(x2)",
}
BATCH = {name: text for name, text in SRUN.items() if "STEP" not in name}  # the script of sbatch itself
ADDRESS = {"JAX_COORDINATOR_ADDRESS": "node1:1234"}
COUNT, INDEX = {"JAX_NUM_PROCESSES": "2"}, {"JAX_PROCESS_ID": "1"}
OFF = {"cluster_detection_method": "deactivate"}  # what is given is all: jax would look for the rest
EXPLICIT = {"coordinator_address": "node1:1234", "num_processes": 2, "process_id": 1} | OFF
OMPI = {f"OMPI_COMM_WORLD_{name}": text for name, text in {"SIZE": "4", "RANK": "3", "LOCAL_RANK": "1"}.items()}
OMPI |= {"OMPI_COMM_WORLD_LOCAL_SIZE": "2"}
TORCH = {"MASTER_ADDR": "node1", "MASTER_PORT": "29500", "RANK": "9", "WORLD_SIZE": "16"}
TORCHRUN = TORCH | {
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "8",
    "TORCHELASTIC_RUN_ID": "none",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
}
OF_TORCH = {"num_processes": 16, "process_id": 9} | OFF
EIGHT, FOUR = {"CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7"}, {"CUDA_VISIBLE_DEVICES": "4,5,6,7"}
TWO_TASKS = {"SLURM_STEP_TASKS_PER_NODE": "2(x8)", "SLURM_LOCALID": "1"}


@pytest.mark.parametrize(
    "variables, source, arguments",
    [
        (SRUN, "SLURM", {"cluster_detection_method": "slurm"}),
        (SRUN | ADDRESS, "JAX_COORDINATOR_ADDRESS", {"coordinator_address": "node1:1234"}),
        (ADDRESS | COUNT | INDEX, "JAX_COORDINATOR_ADDRESS", EXPLICIT),
        (BATCH | ADDRESS | COUNT | INDEX, "JAX_COORDINATOR_ADDRESS", EXPLICIT),  # by a loop over ssh in a job's script
        (ADDRESS | COUNT | {"JOB_COMPLETION_INDEX": "1"}, "JAX_COORDINATOR_ADDRESS", EXPLICIT),  # a JobSet of GPUs
        (ADDRESS, "JAX_COORDINATOR_ADDRESS", {"coordinator_address": "node1:1234"}),  # a slice of TPUs knows the rest
        (OMPI | {"OMPI_MCA_orte_hnp_uri": "x"}, "Open MPI", {"cluster_detection_method": "ompi"}),
        (BATCH | OMPI | {"OMPI_MCA_orte_hnp_uri": "x"}, "Open MPI", {"cluster_detection_method": "ompi"}),
        (
            OMPI | ADDRESS,
            "Open MPI",
            {"coordinator_address": "node1:1234", "num_processes": 4, "process_id": 3} | OFF,
        ),
        (TORCH, "MASTER_ADDR", OF_TORCH | {"coordinator_address": "node1:29500"}),
        (TORCHRUN, "MASTER_ADDR", OF_TORCH | {"coordinator_address": "node1:29501"}),  # torchrun listens at 29500
        (SRUN | TORCHRUN, "MASTER_ADDR", OF_TORCH | {"coordinator_address": "node1:29501"}),  # srun started torchrun
        (SRUN | TORCH, "SLURM", {"cluster_detection_method": "slurm"}),
        (
            {"TPU_WORKER_HOSTNAMES": "a,b", "JOB_COMPLETION_INDEX": "1"},
            "TPU slice of GKE (TPU_WORKER_HOSTNAMES)",
            {"cluster_detection_method": "gketpu"},
        ),
        (
            {"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"},  # of one host each
            "TPU slice of GKE (TPU_WORKER_HOSTNAMES)",
            {"cluster_detection_method": "gketpu"},
        ),
    ],
)
def test_what_started_a_process(variables, source, arguments, tmp_path):
    found = find(variables, tmp_path)
    assert (found.source, found.arguments) == (source, arguments)


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"JAX_COORDINATOR_ADDRESS": ""},
        {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "1"},
        {"SLURM_JOB_ID": "7"},  # a job that says no number of tasks
        BATCH | {"JAX_NUM_PROCESSES": "1"},
        ADDRESS | {"JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"},
        OMPI | {"OMPI_COMM_WORLD_SIZE": "1"},
        TORCHRUN | {"WORLD_SIZE": "1", "RANK": "0"},
        {"TPU_WORKER_HOSTNAMES": "localhost"},  # a slice of one host
        {"TPU_WORKER_HOSTNAMES": "localhost", "MEGASCALE_NUM_SLICES": "1"},
        {"RANK": "0", "MASTER_ADDR": "node1"},
    ],
)
def test_a_process_alone(variables, tmp_path):
    assert find(variables, tmp_path) is None


def test_a_tpu_vm_is_known_by_its_chips(tmp_path, monkeypatch):
    monkeypatch.setattr(environment, "find_spec", lambda name: name == "libtpu")
    vfio, vendor = tmp_path / "dev" / "vfio" / "0", tmp_path / "sys" / "bus" / "pci" / "devices" / "x" / "vendor"
    for path in (vfio, vendor):
        path.parent.mkdir(parents=True)
    vfio.touch()
    vendor.write_text("0x10de\n")  # a card that another machine was given
    assert find({}, tmp_path) is None
    vendor.write_text("0x1ae0\n")
    assert find({}, tmp_path) == Found("TPU VM (metadata server)", {"cluster_detection_method": "gcetpu"})
    assert find({"TPU_SKIP_MDS_QUERY": "1"}, tmp_path) is None


@pytest.mark.parametrize(
    "variables, line",
    [
        (ADDRESS | COUNT, "JAX_COORDINATOR_ADDRESS and JAX_NUM_PROCESSES are set, JAX_PROCESS_ID is not"),
        (ADDRESS | INDEX, "JAX_COORDINATOR_ADDRESS and JAX_PROCESS_ID are set, JAX_NUM_PROCESSES is not"),
        (COUNT | INDEX, "JAX_NUM_PROCESSES and JAX_PROCESS_ID without JAX_COORDINATOR_ADDRESS; set it"),
        (INDEX, "JAX_PROCESS_ID without JAX_COORDINATOR_ADDRESS; .* and JAX_NUM_PROCESSES"),
        (ADDRESS | COUNT | {"JAX_PROCESS_ID": "2"}, "JAX_PROCESS_ID is 2 of JAX_NUM_PROCESSES = 2; .* from 0 to 1"),
        (ADDRESS | INDEX | {"JAX_NUM_PROCESSES": "two"}, "JAX_NUM_PROCESSES is 'two'; it must be a number from 1"),
        (COUNT | INDEX | {"JAX_COORDINATOR_ADDRESS": "node1"}, "JAX_COORDINATOR_ADDRESS is 'node1'; .* HOST:PORT"),
        (BATCH, "16 tasks .SLURM_NTASKS., but srun has not .* .SLURM_STEP_NODELIST is not set.; start it with srun"),
        (SRUN | {"SLURM_STEP_NUM_TASKS": "1"}, "SLURM_STEP_NUM_TASKS is 1"),  # a shell of salloc
        (BATCH | ADDRESS, "JAX_NUM_PROCESSES and JAX_PROCESS_ID are not, and srun has not started this"),
        (SRUN | {"SLURM_NTASKS": "many"}, "SLURM_NTASKS is 'many'"),
        (TORCH | {"MASTER_PORT": ""}, "WORLD_SIZE is set, MASTER_PORT is not; set MASTER_ADDR, MASTER_PORT, RANK, WOR"),
        (TORCH | {"RANK": "16"}, "RANK is 16 of WORLD_SIZE = 16; it must be from 0 to 15"),
        (OMPI, "Open MPI 5 does not say at which host process 0 is; set JAX_COORDINATOR_ADDRESS to HOST:PORT of it"),
        (
            {"JOB_COMPLETION_INDEX": "0"},
            "JOB_COMPLETION_INDEX is set: .* set JAX_COORDINATOR_ADDRESS to HOST:PORT of p",
        ),
        (
            SRUN | {"CUDA_VISIBLE_DEVICES": "0,1,2"},
            r"3 cards \(0, 1, 2\) are visible to process 3 of the 8 on this host",
        ),
    ],
)
def test_what_a_process_lacks_to_join(variables, line, tmp_path, monkeypatch):
    monkeypatch.setattr(environment, "find_spec", lambda name: None)
    with pytest.raises(UserError) as error:
        find(variables, tmp_path)
    assert re.search(line, str(error.value)) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "variables, ids, names",
    [
        (SRUN | EIGHT, [3], ["3"]),
        (SRUN | {"CUDA_VISIBLE_DEVICES": "5"}, [0], ["5"]),  # --gpus-per-task=1
        (SRUN | {"SLURM_STEP_TASKS_PER_NODE": "4,4(x3)", "CUDA_VISIBLE_DEVICES": "1,3,4,7"}, [3], ["7"]),  # gaps
        (
            SRUN | {"SLURM_STEP_TASKS_PER_NODE": "1(x16)", "SLURM_LOCALID": "0"} | EIGHT,
            list(range(8)),
            list("01234567"),
        ),
        (SRUN | {"SLURM_STEP_TASKS_PER_NODE": "4(x4)"} | EIGHT, [6, 7], ["6", "7"]),
        (SRUN | TWO_TASKS | FOUR | {"SLURM_GPUS_PER_TASK": "4"}, [0, 1, 2, 3], list("4567")),
        (
            SRUN
            | {"SLURM_STEP_TASKS_PER_NODE": "4(x4)", "CUDA_VISIBLE_DEVICES": "0,1", "SLURM_GPUS_PER_TASK": "h100:2"},
            [0, 1],
            ["0", "1"],
        ),
        (SRUN | TWO_TASKS | FOUR, [2, 3], ["6", "7"]),  # --gpus-per-node=4: both see the same
        (SRUN | EIGHT | {"SLURM_GPUS_PER_TASK": "1"}, [3], ["3"]),  # with --gpu-bind=none
        (SRUN | TORCHRUN | EIGHT | {"SLURM_GPUS_PER_TASK": "8"}, [1], ["1"]),  # torchrun's processes share the task's
        (TORCHRUN | EIGHT, [1], ["1"]),
        (TORCH | {"LOCAL_RANK": "2"} | EIGHT, [2], ["2"]),  # how many there are is not said: each takes one
        (TORCH | EIGHT, list(range(8)), list("01234567")),  # one process for every host
        (OMPI | {"CUDA_VISIBLE_DEVICES": "GPU-a,GPU-b"} | ADDRESS, [1], ["GPU-b"]),
        (SRUN | EIGHT | ADDRESS | {"JAX_NUM_PROCESSES": "16", "JAX_PROCESS_ID": "11"}, [3], ["3"]),
        (SRUN | EIGHT | {"JAX_LOCAL_DEVICE_IDS": "0,2"}, [0, 2], ["0", "2"]),
    ],
)
def test_which_cards_a_process_takes(variables, ids, names, tmp_path):
    found = find(variables, tmp_path)
    assert found.arguments["local_device_ids"] == ids and list(found.cards.names) == names


def test_which_cards_cuda_shows(tmp_path):
    assert visible_cards({"CUDA_VISIBLE_DEVICES": "2, 5,-1,7"}) == ["2", "5"]
    assert visible_cards({"CUDA_VISIBLE_DEVICES": ""}) is visible_cards({"CUDA_VISIBLE_DEVICES": "NoDevFiles"}) is None
    assert visible_cards(EIGHT | {"JAX_PLATFORMS": "cpu"}) is None
    assert len(visible_cards(EIGHT | {"JAX_PLATFORMS": "cuda,cpu"})) == 8
    for name in ("0000:1b:00.0", "0000:43:00.0"):
        (tmp_path / "proc" / "driver" / "nvidia" / "gpus" / name).mkdir(parents=True)
    assert visible_cards({}, tmp_path) == ["0", "1"]
    with pytest.raises(
        UserError, match="JAX_LOCAL_DEVICE_IDS is '0,2', but 2 cards .0, 1. are visible; give .* 0 to 1"
    ):
        own_cards(["0", "1"], (0, 1), "0,2")


def test_the_line_of_a_process():
    found = Found("SLURM", {}, cards=Cards((1,), 4, ("3",)))
    assert join.line(found, 5, 16, "node2", "node1:62345", 300) == (
        "process 5 of 16 on node2: SLURM, coordinator node1:62345, devices: card 3 of 4 visible; timeout 300 s "
        "(JOIN_TIMEOUT), lost after 100 s of silence"
    )
    assert "devices: all that it has;" in join.line(found._replace(cards=None), 0, 2, "a", "a:1", 1)


def _resolved(*addresses):
    return lambda *_: [(2, 1, 6, "", (address, 0)) for address in addresses]


@pytest.mark.parametrize(
    "address, several, resolved, refused",
    [
        ("localhost:1234", True, ["127.0.0.1", "::1"], "localhost:1234 resolves to 127.0.0.1, which is the loopback"),
        ("127.0.0.1:1234", True, ["127.0.0.1"], "the coordinator 127.0.0.1:1234 is the loopback address"),
        ("[::1]:1234", True, ["::1"], "::1.:1234 is the loopback address"),
        ("node1:1234", True, ["127.0.1.1"], "node1:1234 resolves to 127.0.1.1"),
        ("localhost:1234", False, ["127.0.0.1"], ""),  # one host
        ("here:1234", True, ["127.0.1.1"], ""),  # as Debian names a host to itself: process 0 is here
        ("node1:1234", True, ["127.0.0.1", "10.0.0.1"], ""),
    ],
)
def test_a_coordinator_at_the_loopback_address_of_several_hosts(address, several, resolved, refused):
    if not refused:
        return join.check_coordinator(address, several, "here.cluster", _resolved(*resolved))
    with pytest.raises(UserError, match=f"{refused}.*; give the name or address of process 0's host"):
        join.check_coordinator(address, several, "here.cluster", _resolved(*resolved))


def test_several_hosts_are_known_where_the_launcher_says_so(tmp_path):
    several = [SRUN, TORCHRUN, OMPI | ADDRESS]
    one = [SRUN | {"SLURM_STEP_TASKS_PER_NODE": "16"}, TORCHRUN | {"LOCAL_WORLD_SIZE": "16"}, ADDRESS | COUNT | INDEX]
    assert [find(variables, tmp_path).several_hosts for variables in several + one] == [True] * 3 + [False] * 3


def test_a_process_with_fewer_devices_than_its_cards():
    found = Found("SLURM", {}, cards=Cards((0, 1), 2, ("0", "1")))
    joined = Joined(3, 16, "SLURM", "node2", join.expected(found, {}))
    with pytest.raises(UserError, match=r"process 3 \(node2\) has 1 of 2 devices \(NVIDIA H100\); install the build"):
        join.check_devices(joined, 1, "NVIDIA H100")
    with pytest.raises(UserError, match=r"has 0 of 2 devices \(cpu\)"):
        join.check_devices(joined, 2, "cpu")
    join.check_devices(joined, 2, "NVIDIA H100")
    chips = {"TPU_CHIPS_PER_HOST_BOUNDS": "2,2,1"}
    assert [join.expected(Found(source, {}), chips) for source in ("TPU VM", "SLURM")] == [4, 0]


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Makes files of a machine, starts a process alone on it; (what it joins, settings of jax that it makes)."""

    taken = []

    def make(variables, *files, platforms=None):
        for file in files:
            (tmp_path / file).mkdir(parents=True)
        monkeypatch.setattr(join, "cards_alone", lambda environment: cards_alone(environment, tmp_path))
        monkeypatch.setattr(join.os, "environ", variables)
        monkeypatch.setattr(
            join,
            "jax",
            SimpleNamespace(
                config=SimpleNamespace(jax_platforms=platforms, update=lambda *setting: taken.append(setting)),
                distributed=jax.distributed,
            ),
        )
        return join.join_hosts(), taken

    return make


TWO = [f"{folder}{card}" for folder in ("dev/nvidia", "proc/driver/nvidia/gpus/") for card in "01"]


@pytest.mark.parametrize(
    "variables, files, platforms, expected",
    [
        ({}, TWO, None, 2),
        ({"CUDA_VISIBLE_DEVICES": "1"}, TWO, None, 1),
        ({"JAX_LOCAL_DEVICE_IDS": "1"}, TWO, None, 1),
        ({"JAX_CUDA_VISIBLE_DEVICES": "0"}, TWO, None, 1),
        ({}, [*TWO, "proc/driver/nvidia/capabilities/gpu0/mig/gi1"], None, 1),
        ({}, TWO[2:], None, 0),  # a container without a card on a host that has some
        (EIGHT | {"JAX_LOCAL_DEVICE_IDS": "9"}, [], None, 0),  # left in the environment of a machine without
        ({"CUDA_VISIBLE_DEVICES": ""}, TWO, None, 0),
        ({}, TWO, "cpu", 0),  # a choice
    ],
)
def test_the_cards_of_a_process_alone(machine, variables, files, platforms, expected, capsys):
    joined, taken = machine(variables, *files, platforms=platforms)
    assert (joined.processes, joined.expected) == (1, expected)
    assert taken == [("jax_cuda_visible_devices", "1")] * (expected > 0 and "JAX_LOCAL_DEVICE_IDS" in variables)
    join.check_devices(joined, 1, "cpu")  # goes on
    assert (f"has 0 of {expected} devices (cpu); install the build" in capsys.readouterr().err) == (expected > 0)
    assert join.counted(joined, 1, "cpu") == (not expected)  # what preflight refuses


def test_a_process_alone_chooses_among_its_cards(machine):
    with pytest.raises(UserError, match="JAX_LOCAL_DEVICE_IDS is '2', but 2 cards .0, 1. are visible"):
        machine({"JAX_LOCAL_DEVICE_IDS": "2"}, *TWO)


def test_the_timeout_is_a_variable():
    assert join.timeout({}) == 300 and join.timeout({"JOIN_TIMEOUT": "20"}) == 20
    with pytest.raises(UserError, match="JOIN_TIMEOUT is 'soon'; it must be a number of seconds"):
        join.timeout({"JOIN_TIMEOUT": "soon"})
    with pytest.raises(UserError, match="JOIN_TIMEOUT is '²'; it must be a number of seconds, from 1 on"):
        join.timeout({"JOIN_TIMEOUT": "²"})


def test_others_that_do_not_come_are_worth_another_start(monkeypatch):
    def late(**arguments):
        assert arguments == EXPLICIT | {"initialization_timeout": 37, "heartbeat_timeout_seconds": 100}
        raise jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED: Barrier timed out.\nmore")

    monkeypatch.setattr(jax.distributed, "initialize", late)
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    monkeypatch.setattr(join, "coordinator", lambda: "127.0.0.1:1234")
    monkeypatch.setattr(join, "_wait_for_first", lambda *_: None)
    with pytest.raises(Lost) as error:
        join._join(find(ADDRESS | COUNT | INDEX), 7)
    code, line = cli.outcome(error.value)
    assert code == 75 and line == (
        "error: the other processes, at 127.0.0.1:1234, did not come within 7 s (JAX_COORDINATOR_ADDRESS; "
        "DEADLINE_EXCEEDED: Barrier timed out.); at 127.0.0.1 every host finds itself, so give another address if "
        "there are several"
    )


@pytest.mark.subprocesses
def test_a_process_that_waits_in_vain_ends_with_a_line(subprocess_env):
    """And not in jax's client, which aborts: process 0 of two, the other of which never comes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    job = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0", "JOIN_TIMEOUT": "2"}
    code = "from greedy_distill_jax.distribution.hosts.join import join_hosts; join_hosts()"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env={**subprocess_env, **job}, capture_output=True, text=True)
    assert done.returncode == 75 and done.stderr == (
        f"error: the other processes, at {address}, did not come within 2 s (JAX_COORDINATOR_ADDRESS; some are "
        f"missing); at 127.0.0.1 every host finds itself, so give another address if there are several\n"
    )


def test_a_first_process_that_does_not_come_is_a_line(monkeypatch):
    """And not the abort of jax's client, which would wait for it."""
    joined = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **arguments: joined.append(arguments))
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    with socket.socket() as first:
        first.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{first.getsockname()[1]}"
        found = Found("variables", {"coordinator_address": address, "num_processes": 2, "process_id": 1})
        with pytest.raises(Lost, match=rf"^the other processes, at {address}, did not come within 1 s \(variables; "):
            join._join(found, 1)
        assert not joined
        first.listen()
        monkeypatch.setattr(join.time, "monotonic", iter([0.0, 3.2]).__next__)
        join._join(found, 7)
    assert joined[0]["process_id"] == 1 and joined[0]["initialization_timeout"] == 34, "the rest of the time, and spare"


def test_a_metadata_server_that_does_not_answer_is_a_line(monkeypatch):
    def fails(**_):
        raise RuntimeError("Getting metadata['x'] failed for 6 tries")

    monkeypatch.setattr(jax.distributed, "initialize", fails)
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    with pytest.raises(
        UserError, match=r"cannot ask who the other processes are \(TPU VM: Getting .* JAX_NUM_PROCESSES=1"
    ):
        join._join(Found("TPU VM", {}), 7)


FACTS = {"version of jax": "0.10.2", "code": "abc", "config.data.batch": 8, "data.data.source": "f00"}


def _facts(*changes):
    return [FACTS | {"host": f"node{index}"} | change for index, change in enumerate(changes)]


@pytest.mark.parametrize(
    "changes, line",
    [
        ([{}, {}, {}], ""),
        (
            [{}, {"version of jax": "0.12.0"}, {}],
            'version of jax is "0.12.0" at process 1 (node1), "0.10.2" at the others',
        ),
        ([{"config.data.batch": 16}, {}, {}], "config.data.batch is 16 at process 0 (node0), 8 at the others"),
        ([{}, {"code": "xyz"}], 'code is "xyz" at process 1 (node1), "abc" at the others'),  # of two the first counts
        ([{}, {}, {"data.data.source": None}], 'data.data.source is null at process 2 (node2), "f00" at the others'),
        ([{}, {}, {"config.more": 1}], "config.more is 1 at process 2 (node2), null at the others"),
        (
            [{}] * 6 + [{"code": f"{index}"} for index in range(5)],
            'code is "0" at process 6 (node6), 7 (node7), 8 (node8) and 2 more, "abc" at the others',
        ),
    ],
)
def test_the_line_names_who_differs_and_in_what(changes, line):
    assert alike.difference(_facts(*changes)) == line


def test_a_line_names_three_differences():
    line = alike.difference(_facts({}, {name: "other" for name in FACTS}, {}))
    assert line.count("at process 1 (node1)") == 3 and line.endswith("; 1 more differences")


def _together(*calls, seconds=60):
    """Runs the calls of several processes at once; what each raised, or None."""
    ended = [None] * len(calls)

    def run(index):
        try:
            calls[index](Joined(index, len(calls), host=f"node{index}", seconds=seconds))
        except Exception as error:
            ended[index] = error

    threads = [threading.Thread(target=run, args=(index,), daemon=True) for index in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return ended


@pytest.fixture
def shared(monkeypatch):
    store = FakeStore()
    monkeypatch.setattr(alike, "ServiceStore", lambda: store)
    return store


def test_all_processes_end_with_the_verdict_of_the_first(shared):
    eight, nine = (base() for _ in range(2))
    nine.data.batch = 9
    texts = [read_settings(config).text for config in (eight, nine, eight)]
    ended = _together(*[lambda joined, text=text: alike.check_start(joined, text) for text in texts])
    line = (
        f"config.data.batch is 9 at process 1 (node1), {eight.data.batch} at the others; start all of them "
        f"with the same installation and the same command"
    )
    assert [(type(error), str(error)) for error in ended] == [(UserError, line)] * 3
    sent = json.loads(shared.texts["facts/1"])
    assert sent["version of jax"] == jax.__version__ and len(sent["code"]) == 12


@pytest.mark.parametrize(
    "second, line",
    [
        ({"data.source": "1"}, ""),
        (
            {"data.source": "2"},
            'content of config.data.source is "2" at process 1 .node1., "1" at the others; let',
        ),
    ],
)
def test_data_of_all_processes_are_compared(shared, second, line):
    manifests = {"data.source": "1"}, second
    ended = _together(*[lambda joined, data=data: alike.check_data(joined, data) for data in manifests])
    assert ended == [None, None] if not line else all(re.match(line, str(error)) for error in ended)


def test_a_process_that_does_not_say_what_it_has_is_named(shared):
    ended = _together(lambda joined: alike.check_data(joined, {}), lambda joined: None, seconds=0.1)
    assert isinstance(ended[0], Lost) and "process 1 does not say within 0.1 s" in str(ended[0])


def test_a_process_alone_asks_nobody(monkeypatch):
    monkeypatch.setattr(alike, "ServiceStore", None)
    alike.check_start(Joined())


def test_hashes_are_of_content_and_names(tmp_path):
    (tmp_path / "a.py").write_text("one")
    first = alike.digest(tmp_path)
    (tmp_path / "a.txt").write_text("ignored")
    assert alike.digest(tmp_path) == first
    (tmp_path / "a.py").rename(tmp_path / "b.py")
    assert alike.digest(tmp_path) != first
    named = alike.code_of([f"{tmp_path}/b.py:loss", f"{tmp_path}/c.py:loss", "module:loss", 1])
    assert named == {f"code of {tmp_path}/b.py": alike.digest(tmp_path / "b.py")}


def test_addresses_of_objects_are_not_compared(shared):
    texts = [json.dumps({"a": f"unserializable object: <object at {place}>"}) for place in ("0x7f01", "0x7f02")]
    assert _together(*[lambda joined, text=text: alike.check_start(joined, text) for text in texts]) == [None, None]
