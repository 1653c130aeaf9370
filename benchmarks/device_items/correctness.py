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

from device_items import prefix
from device_items.record import NotHere, Record
from device_items.timing import UNTUNED, error
from greedy_distill_jax.diffusion.noise_levels import uniform_steps
from greedy_distill_jax.diffusion.step_plan import StepPlan
from greedy_distill_jax.errors import UserError
from greedy_distill_jax.models.students import patterns
from greedy_distill_jax.ops.attention import Pattern, chunk_attention, decode_attention, select
from greedy_distill_jax.ops.attention.backends.record import Call
from greedy_distill_jax.streaming.make import make_streamer
from greedy_distill_jax.streaming.session import programs
from greedy_distill_jax.testing import tiny
from greedy_distill_jax.testing.attention import dense_attention

TOLERANCE = {"float32": 2e-5, "bfloat16": 1e-2}
GRADIENT = {"float32": 5e-5, "bfloat16": 2e-2}
STUDENTS, DECODERS, FRAMES, CLIP_TOLERANCE = ("etm_sdd", "causal"), ("tiny VAE", "Wan VAE"), 24, 1e-3
PARTIAL = ((True, False, True, True), (True, True, False, True))  # slots that are filled, by query chunk


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
                shape = dict(chunk=130 if on_gpu else 20, heads=2, dim=128 if on_gpu else 16)
                attention(record, "bfloat16", **shape)
                for student in STUDENTS:
                    record.row(f"clip, {student}, tiny", lambda s=student: clip(s, cpu, expected, record))
                for name in DECODERS:
                    record.row(f"pixels, {name}, tiny", lambda n=name: pixels(n, cpu, expected, record))
                attention(record, "float32", **shape)
            finally:
                cpu.kill()


def attention(record: Record, dtype: str, **shape) -> None:
    """Rows of ``chunk_attention``, its form with a traced mask, and ``decode_attention``."""
    for name in ("cudnn", "xla"):
        record.row(f"{name}, {dtype}", lambda n=name: backend(n, dtype, **shape))
    for name in ("xla", "prefix"):
        record.row(f"mask at run time, {name}, {dtype}", lambda n=name: masked(n, dtype, **shape))
    record.row(f"decode, xla, {dtype}", lambda: decode(dtype, **shape))


def needs(name: str, q_BLNK) -> None:
    """Raises NotHere where a backend cannot run."""
    try:
        select.choose(name, q_BLNK, function="attention")
    except UserError as error:
        raise NotHere(str(error)) from error


def arrays(table: Pattern, dtype: str, heads: int, dim: int) -> list[jax.Array]:
    """q, k, v and a cotangent; other numbers in every run."""
    seed = int.from_bytes(os.urandom(4), "little")
    q, k = table.num_q_chunks * table.q_chunk, table.num_k_chunks * table.k_chunk
    keys = jax.random.split(jax.random.key(seed), 4)
    return [jax.random.normal(key, (1, n, heads, dim), jnp.dtype(dtype)) for key, n in zip(keys, (q, k, k, q))]


def compare(attend, inputs, mask, gradients: bool = True) -> dict[str, float]:
    """Relative error of the output, and of the worst gradient, against float64 in numpy."""
    q, k, v, g = inputs
    exact = dense_attention(q, k, v, mask, q.shape[-1] ** -0.5, g if gradients else None)
    if not gradients:
        return {"output": error(jax.jit(attend, compiler_options=UNTUNED)(q, k, v), exact)}

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
    needs(name, jnp.zeros((1, 1, heads, dim), jnp.dtype(dtype)))
    found = {}
    with jax.default_matmul_precision("highest"):
        for label, table in tables(chunk).items():
            attend = functools.partial(chunk_attention, pattern=table, implementation=name)
            inputs = arrays(table, dtype, heads, dim)
            found[label] = compare(lambda q, k, v, a=attend: a(q, k, v), inputs, table.dense_mask())
    return worst(found, dtype)


def masked(name: str, dtype: str, chunk: int, heads: int, dim: int) -> dict:
    """Two query chunks, of whose four key chunks each sees three, known at run time."""
    if name == "prefix" and jax.default_backend() != "cpu" and dtype == "float32":
        raise NotHere("cuDNN's fused attention takes bfloat16 or float16")
    table = Pattern.from_table([range(4)] * 2, q_chunk=chunk, num_k_chunks=4)
    visible = jnp.asarray(PARTIAL)

    def attend(q, k, v):
        if name == "prefix":
            return prefix.attend(q, k, v, visible, Call(table, q.shape[-1] ** -0.5))
        return chunk_attention(q, k, v, table, visible_QS=visible, implementation=name)

    mask = np.asarray(PARTIAL).repeat(chunk, 0).repeat(chunk, 1)
    with jax.default_matmul_precision("highest"):
        return worst({"three of four": compare(attend, arrays(table, dtype, heads, dim), mask)}, dtype)


def decode(dtype: str, chunk: int, heads: int, dim: int) -> dict:
    """A cache of five chunks, filled to the middle of the third."""
    table = Pattern.from_table([range(5)], q_chunk=chunk, num_k_chunks=5)
    length, inputs = 2 * chunk + chunk // 2, arrays(table, dtype, heads, dim)
    mask = np.broadcast_to(np.arange(5 * chunk) < length, (chunk, 5 * chunk))
    with jax.default_matmul_precision("highest"):
        return worst(
            {
                "half filled": compare(
                    lambda q, k, v: decode_attention(q, k, v, jnp.int32(length), implementation="xla"),
                    inputs,
                    mask,
                    gradients=False,
                )
            },
            dtype,
        )


def frames_of(student: str) -> np.ndarray:
    """A streamed clip of the tiny model in float32, latents."""
    run = SIZES["tiny"].run(student)
    text = tiny.text_rows(1, jax.random.key(1), run.model.cfg.base)
    plan = StepPlan((uniform_steps(2, 5.0),), "renoise")
    with jax.default_matmul_precision("highest"):
        init, step, _ = programs(make_streamer(run.model, plan))
        state, out = init(run.params, text, jax.random.key(2), run.latent_shape[1:]), []
        for _ in range(FRAMES // run.model.cfg.chunk):
            state, x = step(run.params, state)
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
