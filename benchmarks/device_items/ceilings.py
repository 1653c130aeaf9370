"""What the card reaches at most: a large matmul and a copy, in jax, each compared with what it should give."""

import json

import jax
import jax.numpy as jnp
import numpy as np

from device_items.record import OK, Record
from device_items.timing import median_ms
from greedy_distill_jax.measure import environment
from greedy_distill_jax.testing.attention import relative_error

ROWS = 4  # of the product that are computed again in float64
MATMUL, COPY = "matmul TFLOP/s", "copy TB/s"


def run(record: Record) -> None:
    """Both."""
    dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    record.row(f"matmul {dtype}", lambda: matmul(dtype))
    record.row("copy", copy)


def matmul(dtype: str) -> dict:
    """A square product of random matrices."""
    n = environment.matmul_side()
    a, b = (jax.random.normal(jax.random.key(i), (n, n), jnp.dtype(dtype)) for i in range(2))
    multiply = jax.jit(jnp.matmul)
    exact = np.asarray(a[:ROWS], np.float64) @ np.asarray(b, np.float64)
    difference = relative_error(np.asarray(multiply(a, b)[:ROWS], np.float64), exact)
    ms, runs = median_ms(lambda: multiply(a, b), seconds=2.0)
    return {
        "figures": {MATMUL: 2e-9 * n**3 / ms},
        "checks": {"largest difference of an entry": (difference, 1e-2)},
        "shape": [n, n, n],
        "dtype": dtype,
        "ms": ms,
        "runs": runs,
    }


def copy() -> dict:
    """An array read and written once; its sign changes, so that the compiler cannot leave it out."""
    size = environment.COPY.get(jax.default_backend(), environment.LARGE_COPY)
    x = jax.random.normal(jax.random.key(2), (size // 4,), jnp.float32)
    negative = jax.jit(jnp.negative)
    wrong = int(jnp.sum(negative(x) + x != 0.0))
    ms, runs = median_ms(lambda: negative(x), seconds=2.0)
    return {
        "figures": {COPY: 2e-9 * size / ms},
        "checks": {"entries that differ": (wrong, 1)},
        "bytes": 2 * size,
        "ms": ms,
        "runs": runs,
    }


def matmul_flops(record: Record, dtype: str) -> float:
    """The first item's matmul ceiling in FLOP/s, measured again where this run does not have it."""
    for path in record.path.parent.glob("*-ceilings.json"):
        row = json.loads(path.read_text())["rows"].get(f"matmul {dtype}", {})
        if row.get("status") == OK:
            return 1e12 * row["figures"][MATMUL]
    return 1e12 * matmul(dtype)["figures"][MATMUL]
