"""Compiles for devices that are not there: describes them, and counts what the compiler made of the TPU kernels.

libtpu compiles for a described slice of TPUs on any machine, jax's CUDA plugin for described NVIDIA cards. libtpu's
schedule analysis gives the number of VLIW bundles of a kernel; the useful work (unmasked pairs only) per bundle ranks
block sizes and guards against regressions. It is a static figure, not a speed. ``cost_analysis()`` would only echo the
estimate that the kernel states itself.
"""

import contextlib
import importlib.metadata
import importlib.util
import os
import re
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from greedy_distill_jax.errors import UserError
from greedy_distill_jax.ops.attention import backends, select
from greedy_distill_jax.ops.attention.api import chunk_attention
from greedy_distill_jax.ops.attention.arg_specs import Spec
from greedy_distill_jax.ops.attention.backends.record import Backend
from greedy_distill_jax.ops.attention.tuning import Blocks

TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
CARDS = {path.stem: path for path in sorted((Path(__file__).parent / "cards").glob("*.txtpb"))}
CUDA_JAX = "0.11.2"  # the oldest that was seen to compile for described cards
DUMP = "MOSAIC_GPU_DUMP_PTXAS"
_ENTRY = re.compile(r"Compiling entry function '(\w+?)_mosaic_gpu_kernel'(.*?Used \d+ registers)", re.DOTALL)
_REGISTERS = re.compile(r"Used (\d+) registers")
_SPILLS = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")
_BUNDLES = re.compile(r"total scheduled bundles:\s+(\d+)")


@contextlib.contextmanager
def bundle_dump() -> Iterator[Path]:
    """A folder in which libtpu leaves its schedule analysis. Only before the first use of libtpu in a process."""
    with tempfile.TemporaryDirectory(prefix="llo") as folder:
        options = (
            f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true "
            "--xla_jf_dump_llo_pass_label_regex=.*final_bundles.*"
        )
        os.environ["LIBTPU_INIT_ARGS"] = f"{os.environ.get('LIBTPU_INIT_ARGS', '')} {options}".strip()
        yield Path(folder)


def target_mesh(target: str) -> Mesh:
    """A mesh of one described device.

    Raises:
      UserError: no such target, or libtpu is not installed.
    """
    found = {**TOPOLOGIES, **{name: f"{name}:1" for name in CARDS}}
    if target not in found:
        raise UserError(f"unknown target {target!r}; choose from {', '.join(found)}.")
    return Mesh(np.array(describe(found[target]).devices[:1]), ("device",))


def describe(topology: str):
    """jax's description of a slice such as "v5p:2x2x1", or of cards of one host such as "h200:8".

    Its compiler is asked from that.

    Raises:
      UserError: libtpu, or for cards jax's CUDA plugin, is not installed.
    """
    name, _, size = topology.partition(":")
    return _cards(name, int(size)) if name in CARDS else _slice(topology)


def _slice(topology: str):
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("compiling for a TPU needs its compiler, which is not installed; pip install libtpu.")
    # Without these libtpu asks the cloud's metadata server who it is, and locks out other processes as from a device.
    described = {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_ACCELERATOR_TYPE": "v5p-8"}
    for name, value in (described | {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}).items():
        os.environ.setdefault(name, value)
    return topologies.get_topology_desc(platform="tpu", topology_name=topology)


def _cards(name: str, count: int):
    if importlib.util.find_spec("jax_cuda13_plugin") is None:
        raise UserError(
            f"compiling for an NVIDIA card needs jax's compiler for it, which is not installed (a card or a driver is "
            f"not needed); pip install 'jax>={CUDA_JAX}' jax-cuda13-plugin, with Python 3.12."
        )
    if jax.__version_info__ < tuple(map(int, CUDA_JAX.split("."))):
        raise UserError(
            f"compiling for an NVIDIA card that is not there needs jax {CUDA_JAX}, and this is {jax.__version__}; pip "
            f"install 'jax>={CUDA_JAX}' jax-cuda13-plugin, with Python 3.12."
        )
    options = {"target_config": CARDS[name].read_text(encoding="utf-8"), "topology": f"1x1x{count}"}
    return topologies.get_topology_desc(platform="cuda", topology_name=name, **options)


def interruptible(work: Callable[[], Any]) -> Any:
    """``work()`` in a thread of its own: Python acts on no signal while the main thread waits for a compiler."""
    result: Future = Future()

    def run():
        try:
            result.set_result(work())
        except BaseException as error:  # whatever it is, it is raised where it is waited for
            result.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    while not result.done():
        wait([result], timeout=0.5)
    return result.result()


@contextlib.contextmanager
def assembler_report() -> Iterator[dict[str, dict[str, int]]]:
    """{kernel: {registers of a thread, bytes that it spills}} of the Mosaic GPU kernels that are compiled meanwhile.

    NVIDIA's assembler prints them; what else goes to standard output and error meanwhile is lost.
    """
    found: dict[str, dict[str, int]] = {}
    sys.stdout.flush(), sys.stderr.flush()
    with tempfile.TemporaryFile("w+") as said, contextlib.ExitStack() as back:
        for stream in (1, 2):
            kept = os.dup(stream)
            back.callback(os.close, kept)
            back.callback(os.dup2, kept, stream)
            os.dup2(said.fileno(), stream)
        os.environ[DUMP] = "1"
        back.callback(os.environ.pop, DUMP)
        yield found
        back.close()
        said.seek(0)
        for name, text in _ENTRY.findall(said.read()):
            registers, spills = _REGISTERS.search(text), _SPILLS.search(text)
            found[name] = {"registers": int(registers[1]), "spilled": int(spills[1]) + int(spills[2])}


def compile_spec(spec: Spec, mesh: Mesh, *, blocks: Blocks | None = None, dump: Path | None = None) -> dict:
    """Compiles forward and backward of one workload.

    Args:
      spec: the workload.
      mesh: one described device (``target_mesh``).
      blocks: block sizes; None takes the tuned ones of the device.
      dump: the folder of ``bundle_dump``, if bundles are wanted.

    Returns:
      seconds; memory {arguments, outputs, temporaries, code} in bytes; with ``dump`` bundles {kernel: number} and
      kflop_per_bundle {kernel: useful kFLOP of one grid step per bundle}; for a card assembled {kernel: {registers,
      spilled}} and, where its backend has them, estimates {kernel: what can be said of it}.

    Raises:
      UserError: no kernels run that there.
    """
    shapes = spec.shapes(NamedSharding(mesh, PartitionSpec()))
    card = mesh.devices.flat[0].platform != "tpu"
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        backend = _with_kernels(spec, shapes[0], best=not card)

    def forward(q, k, v):
        return chunk_attention(q, k, v, spec.pattern, implementation=backend.name, blocks=blocks)

    def both(q, k, v, g):
        out, pull = jax.vjp(forward, q, k, v)
        return out, pull(g)

    before = set(dump.iterdir()) if dump else set()
    start = time.perf_counter()
    report = assembler_report() if card else contextlib.nullcontext()
    with report as assembled, jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        stats = interruptible(jax.jit(both).lower(*shapes).compile).memory_analysis()
    result = {
        "seconds": time.perf_counter() - start,
        "memory": {
            "arguments": stats.argument_size_in_bytes,
            "outputs": stats.output_size_in_bytes,
            "temporaries": stats.temp_size_in_bytes,
            "code": stats.generated_code_size_in_bytes,
        },
    }
    if card:
        result["assembled"] = assembled
        if backend.estimates is not None:
            sizes = blocks or backend.blocks(mesh.devices.flat[0].device_kind, spec.pattern, spec.dim, spec.dtype)
            result["estimates"] = backend.estimates(spec.pattern, shapes[0], sizes)
    if dump:
        result["bundles"] = _bundles(set(dump.iterdir()) - before, backend)
        result["kflop_per_bundle"] = {
            name: round(_useful_kflop(spec, name, blocks, mesh, backend) / count, 1)
            for name, count in result["bundles"].items()
        }
    return result


def _with_kernels(spec: Spec, q, *, best: bool) -> Backend:
    """The first backend with kernels that can run a workload on the device that is being traced for.

    ``best``: it has to be what runs there when no backend is named.
    """
    reasons = []
    if best and not (backend := select.choose(None, q, spec.pattern, function=spec.name)).kernels:
        raise UserError(f"the best backend there is {backend.name!r}, which has no kernels to compile.")
    for backend in backends.BACKENDS:
        if backend.kernels:
            try:
                return select.choose(backend.name, q, spec.pattern, function=spec.name)
            except UserError as error:
                reasons.append(str(error).removeprefix(f"{spec.name}: ").partition(";")[0])
    raise UserError(f"no kernels run it there: {'; '.join(reasons)}.")


def _bundles(files: set[Path], backend: Backend) -> dict[str, int]:
    found = {}
    for path in files:
        for name in backend.kernels:
            if name in path.name and path.name.endswith("schedule-analysis_final_bundles.txt"):
                found[name] = int(_BUNDLES.search(path.read_text())[1])
    for path in files:
        path.unlink()
    return dict(sorted(found.items()))


def _useful_kflop(spec: Spec, name: str, blocks: Blocks | None, mesh: Mesh, backend: Backend) -> float:
    """kFLOP of one average grid step, counted on unmasked pairs."""
    pattern, kernel = spec.pattern, backend.kernels[name]
    kind = mesh.devices.flat[0].device_kind
    blocks = blocks or backend.blocks(kind, pattern, spec.dim, spec.dtype)
    by_query, by_key = pattern.block_lists(*getattr(blocks, kernel.blocks))
    steps = len((by_key if kernel.by_key else by_query).outer)
    return 2 * kernel.matmuls * spec.dim * pattern.pairs / steps / 1e3


def compiler_version(target: str) -> str:
    """The package that compiles for a target, and its installed version."""
    package = "jax-cuda13-plugin" if target in CARDS else "libtpu"
    return f"{package} {importlib.metadata.version(package)}"


def libtpu_version() -> str:
    """The installed version."""
    return importlib.metadata.version("libtpu")
