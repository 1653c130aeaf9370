"""One chunk of queries against the filled prefix of a cache."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from greedy_distill_jax.errors import UserError
from greedy_distill_jax.ops.attention import decode_attention
from greedy_distill_jax.ops.attention.backends import xla
from greedy_distill_jax.ops.attention.tuning import Blocks
from greedy_distill_jax.testing.attention import dense_attention, relative_error

SLOTS = 24


@functools.partial(jax.jit, static_argnames=("implementation", "blocks", "interpret"))
def _decode(q, k, v, length, **options):
    return decode_attention(q, k, v, length, **options)


@pytest.mark.parametrize(
    "options, dim",
    [
        (dict(implementation="reference"), 8),
        (dict(implementation="xla"), 8),
        (dict(implementation="mosaic_tpu", blocks=Blocks(*[(8, 8)] * 3), interpret=True), 64),
        # 24 slots do not fill blocks of 16.
        (dict(implementation="mosaic_tpu", blocks=Blocks(*[(10, 16)] * 3), interpret=True), 128),
    ],
)
def test_equals_dense_for_every_length(options, dim, monkeypatch):
    monkeypatch.setattr(xla, "DECODE_BLOCK", 8)
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((2, n, 2, dim)).astype(np.float32) for n in (10, SLOTS, SLOTS))
    for length in (0, 1, 8, 13, SLOTS):
        free = np.arange(SLOTS)[:, None, None] >= length
        # What lies in free slots must not matter.
        junk = np.where(free, 1e9 if options["implementation"] != "mosaic_tpu" else np.nan, 0).astype(np.float32)
        out = _decode(q, k + junk, v + junk, jnp.int32(length), **options)
        exact = dense_attention(q, k, v, np.arange(SLOTS)[None] < length, dim**-0.5)
        assert relative_error(out, exact) < 2e-5, length


def test_a_ring_gives_the_same_in_any_order():
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((1, n, 1, 8)), jnp.float32) for n in (4, SLOTS, SLOTS))
    turned = [jnp.roll(x, 7, axis=1) for x in (k, v)]
    np.testing.assert_allclose(decode_attention(q, k, v, SLOTS), decode_attention(q, *turned, SLOTS), atol=1e-6)


def test_refuses_what_cannot_run():
    x = jnp.zeros((1, 4, 1, 8))
    with pytest.raises(UserError, match="decode_attention: 'cudnn' cannot run here.*use xla"):
        decode_attention(x, x, x, 4, implementation="cudnn")
