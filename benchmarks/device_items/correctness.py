"""Is what runs on the card right? Attention by every backend that can run, and a streamed clip against the CPU's."""

import functools
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from sizes import SIZES

from device_items.record import NotHere, Record
from device_items.timing import UNTUNED, error
from greedy_distill_jax.diffusion.noise_levels import uniform_steps
from greedy_distill_jax.diffusion.step_plan import StepPlan
from greedy_distill_jax.errors import UserError
from greedy_distill_jax.models.students import patterns
from greedy_distill_jax.ops.attention import Pattern, chunk_attention, select
from greedy_distill_jax.streaming.make import make_streamer
from greedy_distill_jax.streaming.session import programs
from greedy_distill_jax.testing import tiny
from greedy_distill_jax.testing.attention import dense_attention

TOLERANCE = {"float32": 2e-5, "bfloat16": 1e-2}
BACKENDS = ("mosaic_gpu", "cudnn", "xla")
GRADIENT = {"float32": 5e-5, "bfloat16": 2e-2}
STUDENTS, DECODERS, FRAMES, CLIP_TOLERANCE = ("etm_sdd", "causal"), ("tiny VAE", "Wan VAE"), 24, 1e-3


def tables(chunk: int) -> dict[str, Pattern]:
    """Small tables of every kind that the models have."""
    return {
        "window 3, sink 1": Pattern.sliding_window(6, chunk, 3, 1),
        "teacher forcing": patterns.causal_parallel(tiny.causal_config(), 4, chunk).pattern,
        "full": Pattern.full(3, chunk),
        "text": Pattern.from_table([(0,)] * 3, q_chunk=chunk, k_chunk=512 if chunk > 100 else 8, num_k_chunks=1),
    }


def run(record: Record) -> None:
    """The clips' expected frames are made by another process, on the CPU, while attention is checked."""
    on_gpu = jax.default_backend() != "cpu"
    with tempfile.TemporaryDirectory() as folder:
        expected = Path(folder) / "clips.npz"
        command = [sys.executable, __file__, str(expected)]
        path = os.pathsep.join(filter(None, [str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH")]))
        env = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": path}
        with subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True) as cpu:
            try:
                shape = dict(chunk=136 if on_gpu else 20, heads=2, dim=128 if on_gpu else 16)
                attention(record, "bfloat16", **shape)
                for student in STUDENTS:
                    record.row(f"clip, {student}, tiny", lambda s=student: clip(s, cpu, expected, record))
                for name in DECODERS:
                    record.row(f"pixels, {name}, tiny", lambda n=name: pixels(n, cpu, expected, record))
                attention(record, "float32", **shape)
            finally:
                cpu.kill()


def attention(record: Record, dtype: str, **shape) -> None:
    """Rows of ``chunk_attention``, and of its form with lengths that are known at run time."""
    for name in BACKENDS:
        record.row(f"{name}, {dtype}", lambda n=name: backend(n, dtype, **shape))
    for name in BACKENDS:
        record.row(f"lengths at run time, {name}, {dtype}", lambda n=name: partly(n, dtype, **shape))


def needs(name: str, q_BLNK, table: Pattern) -> None:
    """Raises NotHere where a backend cannot run."""
    try:
        select.choose(name, q_BLNK, table, function="attention")
    except UserError as error:
        raise NotHere(str(error)) from error


def arrays(table: Pattern, dtype: str, heads: int, dim: int) -> list[jax.Array]:
    """q, k, v and a cotangent; other numbers in every run."""
    seed = int.from_bytes(os.urandom(4), "little")
    q, k = table.num_q_chunks * table.q_chunk, table.num_k_chunks * table.k_chunk
    keys = jax.random.split(jax.random.key(seed), 4)
    return [jax.random.normal(key, (1, n, heads, dim), jnp.dtype(dtype)) for key, n in zip(keys, (q, k, k, q))]


def compare(attend, inputs, mask) -> dict[str, float]:
    """Relative error of the output, and of the worst gradient, against float64 in numpy."""
    q, k, v, g = inputs
    exact = dense_attention(q, k, v, mask, q.shape[-1] ** -0.5, g)

    @functools.partial(jax.jit, compiler_options=UNTUNED)
    def both(q, k, v, g):
        out, pull = jax.vjp(attend, q, k, v)
        return out, *pull(g)

    out, *grads = (error(x, e) for x, e in zip(both(q, k, v, g), exact))
    return {"output": out, "gradients": float(np.max(grads))}  # a NaN stays one


def worst(found: dict[str, dict[str, float]], dtype: str) -> dict:
    """A row: the worst case decides."""
    limits = {"output": TOLERANCE[dtype], "gradients": GRADIENT[dtype]}
    checks = {
        label: (float(np.max([case[label] for case in found.values() if label in case])), limit)
        for label, limit in limits.items()
        if any(label in case for case in found.values())
    }
    return {
        "figures": {f"error of {label}": value for label, (value, _) in checks.items()},
        "checks": checks,
        "cases": found,
    }


def backend(name: str, dtype: str, chunk: int, heads: int, dim: int) -> dict:
    """Every table by one implementation, forward and backward."""
    needs(name, jnp.zeros((1, 1, heads, dim), jnp.dtype(dtype)), Pattern.full(1, chunk))
    found = {}
    with jax.default_matmul_precision("highest"):
        for label, table in tables(chunk).items():
            attend = functools.partial(chunk_attention, pattern=table, implementation=name)
            inputs = arrays(table, dtype, heads, dim)
            found[label] = compare(lambda q, k, v, a=attend: a(q, k, v), inputs, table.dense_mask())
    return worst(found, dtype)


def partly(name: str, dtype: str, chunk: int, heads: int, dim: int) -> dict:
    """A stream's chunk with half of its slots filled, and two query chunks that see other parts of other lists."""
    needs(name, jnp.zeros((1, 1, heads, dim), jnp.dtype(dtype)), Pattern.full(1, chunk))
    cases, found = {"a stream": (((0, 1, 2, 3),), (2,)), "two lists": (((3, 1, 0, 2), (0, 2, 3, 1)), (3, 1))}, {}
    with jax.default_matmul_precision("highest"):
        for label, (rows, lengths) in cases.items():
            table = Pattern.from_table(rows, q_chunk=chunk, num_k_chunks=4)
            visible = [row[:n] for row, n in zip(rows, lengths)]
            mask = Pattern.from_table(visible, q_chunk=chunk, num_k_chunks=4).dense_mask()
            attend = functools.partial(
                chunk_attention, pattern=table, lengths_Q=jnp.asarray(lengths, jnp.int32), implementation=name
            )
            found[label] = compare(lambda q, k, v, a=attend: a(q, k, v), arrays(table, dtype, heads, dim), mask)
    return worst(found, dtype)


def frames_of(student: str) -> np.ndarray:
    """A streamed clip of the tiny model in float32, latents."""
    run = SIZES["tiny"].run(student)
    text = tiny.text_rows(1, jax.random.key(1), run.model.cfg.base)
    plan = StepPlan((uniform_steps(2, 5.0),), "renoise")
    with jax.default_matmul_precision("highest"):
        own = programs(make_streamer(run.model, plan))
        state, out = own.init(run.params, text, jax.random.key(2), run.latent_shape[1:]), []
        for made in range(FRAMES // run.model.cfg.chunk):
            state, x = own.step(made)(run.params, state)
            out.append(np.asarray(x))
    return np.concatenate(out, axis=1)


def decoded(name: str, latents: np.ndarray) -> np.ndarray:
    """Its pixels by one of the tiny model's decoders."""
    with jax.default_matmul_precision("highest"):
        return SIZES["tiny"].codecs()[name].decode(latents)


def clips(cpu: subprocess.Popen, expected: Path, seconds: float):
    """What the other process made."""
    _, told = cpu.communicate(timeout=max(seconds, 1.0))
    if cpu.returncode:
        raise RuntimeError(f"the process that makes the clips on the CPU failed: {told.splitlines()[-1:]}")
    return np.load(expected)


def clip(student: str, cpu: subprocess.Popen, expected: Path, record: Record) -> dict:
    """The same clip here."""
    found = frames_of(student)
    exact = clips(cpu, expected, record.left())[student]
    difference = float(np.abs(found - exact).max() / exact.std())
    return {
        "figures": {"largest difference": difference},
        "checks": {"largest difference": (difference, CLIP_TOLERANCE)},
        "shape": list(found.shape),
        "dtype": "float32",
    }


def pixels(name: str, cpu: subprocess.Popen, expected: Path, record: Record) -> dict:
    """The same pixels of the same latents here, of 256 levels."""
    exact = clips(cpu, expected, record.left())
    found = decoded(name, exact[STUDENTS[0]])
    difference = int(np.abs(found.astype(int) - exact[name].astype(int)).max())
    return {
        "figures": {"largest difference": difference},
        "checks": {"largest difference": (difference, 2)},
        "shape": list(found.shape),
        "dtype": "float32",
    }


def main() -> None:
    """The clips, in a file; for the process on the CPU."""
    made = {student: frames_of(student) for student in STUDENTS}
    made |= {name: decoded(name, made[STUDENTS[0]]) for name in DECODERS}
    np.savez(sys.argv[1], **made)


if __name__ == "__main__":
    main()
