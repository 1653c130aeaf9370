"""Chunk attention in every implementation that a CPU can run, against a float64 oracle."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from jax.experimental.pallas import mosaic_gpu as plgpu

from greedy_distill_jax.errors import UserError
from greedy_distill_jax.ops.attention import Pattern, chunk_attention
from greedy_distill_jax.ops.attention.backends import cudnn, xla
from greedy_distill_jax.ops.attention.backends.record import Call
from greedy_distill_jax.ops.attention.tuning import Blocks
from greedy_distill_jax.testing.attention import dense_attention, relative_error

SCALE = 0.3


def _inputs(pattern, seed=0, batch=2, heads=2, dim=8, dtype=jnp.float32):
    """q, k, v and a cotangent."""
    rng = np.random.default_rng(seed)
    length, slots = pattern.q_tokens, pattern.k_tokens
    return [jnp.asarray(rng.standard_normal((batch, n, heads, dim)), dtype) for n in (length, slots, slots, length)]


@functools.partial(jax.jit, static_argnums=(0, 1), static_argnames=("blocks", "interpret", "form"))
def _run(pattern, implementation, lengths, q, k, v, g, form=None, **options):
    """``form`` does nothing here: what was traced for one form is not taken for another."""

    def f(q, k, v):
        return chunk_attention(
            q, k, v, pattern, lengths_Q=lengths, implementation=implementation, scale=SCALE, **options
        )

    out, pull = jax.vjp(f, q, k, v)
    return out, *pull(g)


def _exact(pattern, lengths, q, k, v, g):
    if lengths is not None:
        table = [row[:n] for row, n in zip(pattern.table, np.asarray(lengths).tolist(), strict=True)]
        pattern = dataclasses.replace(pattern, table=tuple(table))
    mask = pattern.chunk_mask()
    mask = mask.repeat(pattern.q_chunk, 0).repeat(pattern.k_chunk, 1)
    return dense_attention(q, k, v, mask, SCALE, g)


def _check(pattern, implementation, lengths=None, *, tolerance=2e-5, heads=2, batch=2, dim=8, **options):
    inputs = _inputs(pattern, batch=batch, heads=heads, dim=dim)
    got = _run(pattern, implementation, lengths, *inputs, **options)
    for name, ours, exact in zip(("out", "dq", "dk", "dv"), got, _exact(pattern, lengths, *inputs), strict=True):
        assert relative_error(ours, exact) < tolerance, name


def teacher_forcing(chunks, tokens, window, sink):
    """[clean | noisy] chunks: a noisy one sees the clean ones before it, and itself."""
    clean = Pattern.sliding_window(chunks, tokens, window, sink).table
    noisy = [[j for j in row if j != i] + [chunks + i] for i, row in enumerate(clean)]
    return Pattern.from_table([*clean, *noisy], q_chunk=tokens, num_k_chunks=2 * chunks)


@st.composite
def patterns(draw, longest=3):
    """Any table, or one of the patterns; with empty lists and first chunks."""
    tokens = draw(st.integers(1, longest))
    if draw(st.booleans()):
        build = draw(st.sampled_from([Pattern.sliding_window, teacher_forcing]))
        return build(draw(st.integers(1, 4)), tokens, draw(st.integers(1, 3)), draw(st.integers(0, 2)))
    num_k = draw(st.integers(1, 4))
    rows = draw(st.lists(st.sets(st.integers(0, num_k - 1)), min_size=1, max_size=4))
    k_chunk = draw(st.integers(1, longest))
    rows = [draw(st.permutations(sorted(row))) for row in rows]
    return Pattern.from_table(rows, q_chunk=tokens, k_chunk=k_chunk, num_k_chunks=num_k)


def _lengths(pattern):
    """Of every list a part, from none to all of it."""
    listed = np.array([len(row) for row in pattern.table])
    return jnp.asarray(np.random.default_rng(1).integers(0, listed + 1), jnp.int32)


@settings(max_examples=6)
@given(patterns(), st.booleans())
@pytest.mark.parametrize("form", ["gathered", "scanned"])
def test_xla_equals_dense(form, pattern, partly):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(xla, "GATHER_AREA", 0 if form == "scanned" else 1 << 10)
        patch.setattr(xla, "BLOCK", 2)
        _check(pattern, "xla", _lengths(pattern) if partly else None, form=form)


@settings(max_examples=8)
@given(
    patterns(longest=24),
    st.sampled_from([(8, 8), (8, 16), (24, 24)]),
    st.sampled_from([64, 128]),
    st.integers(1, 2),
    st.integers(1, 2),
    st.booleans(),
)
def test_mosaic_tpu_equals_dense(pattern, pair, dim, heads, batch, partly):
    """Ragged chunks included: blocks that hang over the end of a chunk read NaN in interpret mode."""
    pair = tuple(min(block, chunk) for block, chunk in zip(pair, (pattern.q_chunk, pattern.k_chunk), strict=True))
    lengths = _lengths(pattern) if partly else None
    options = dict(blocks=Blocks(pair, pair, pair), interpret=True)
    _check(pattern, "mosaic_tpu", lengths, heads=heads, batch=batch, dim=dim, **options)


def test_reference_equals_the_oracle():
    pattern = Pattern.from_table([(1,), (), (2, 0)], q_chunk=2, k_chunk=3, num_k_chunks=3)
    for lengths in (_lengths(pattern), jnp.asarray([0, 0, 1], jnp.int32)):
        _check(pattern, "reference", lengths)


@pytest.mark.parametrize("lengths", [None, (1, 0, 2, 0), (0, 0, 1, 1)])
@pytest.mark.parametrize("rows", [[(1,), (), (2, 0), (2,)], [(2, 0, 1)], [(0, 1, 2)]], ids=len)
def test_slices_for_cudnn_equal_dense(rows, lengths):
    """The slicing is checked with XLA's attention in cuDNN's place."""
    pattern = Pattern.from_table(rows, q_chunk=2, k_chunk=3, num_k_chunks=3)
    lengths = None if lengths is None else jnp.asarray(lengths[-len(rows) :], jnp.int32)
    *qkv, g = _inputs(pattern)
    out, pull = jax.vjp(lambda *x: cudnn.attend(*x, lengths, Call(pattern, SCALE), inner="xla"), *qkv)
    for ours, exact in zip((out, *pull(g)), _exact(pattern, lengths, *qkv, g), strict=True):
        assert relative_error(ours, exact) < 2e-5


@pytest.mark.parametrize("implementation", ["xla", "reference", "cudnn", "mosaic_tpu"])
def test_what_lies_in_free_slots_does_not_matter(implementation):
    """A stream's cache: itself first, then slots that fill from the front."""
    pattern = Pattern.full(1, 8, 4)
    q, k, v, _ = _inputs(pattern, dim=64)
    kernels = dict(blocks=Blocks(*[(8, 8)] * 3), interpret=True) if implementation == "mosaic_tpu" else {}
    for length in (1, 3, 4):
        free = jnp.arange(k.shape[1])[None, :, None, None] >= length * pattern.k_chunk
        junk, lengths = jnp.where(free, 1e9, 0.0).astype(k.dtype), jnp.asarray([length], jnp.int32)
        if implementation == "cudnn":
            out = cudnn.attend(q, k + junk, v + junk, lengths, Call(pattern, SCALE), inner="xla")
        else:
            options = dict(implementation=implementation, scale=SCALE, lengths_Q=lengths, **kernels)
            out = chunk_attention(q, k + junk, v + junk, pattern, **options)
        mask = np.arange(k.shape[1])[None] < length * pattern.k_chunk
        assert relative_error(out, dense_attention(q, k, v, mask, SCALE)) < 2e-5, length


def test_the_scan_does_not_read_what_is_hidden(monkeypatch):
    """Where there is no number: forward, backward, in forward mode, and under vmap over lengths."""
    monkeypatch.setattr(xla, "GATHER_AREA", 0)
    pattern, lengths = Pattern.full(1, 8, 4), jnp.asarray([2], jnp.int32)
    q, k, v, g = _inputs(pattern)
    seen = (q, *(x.at[:, 16:].set(0.0) for x in (k, v)))
    given_ = (q, *(x.at[:, 16:].set(jnp.nan) for x in (k, v)))

    def attend(q, k, v, lengths=lengths):
        return chunk_attention(q, k, v, pattern, lengths_Q=lengths, implementation="xla", scale=SCALE)

    out, pull = jax.vjp(attend, *given_)
    exact = _exact(pattern, lengths, *seen, g)
    for ours, dense in zip((out, *pull(g)), exact, strict=True):
        assert relative_error(ours, dense) < 2e-5
    _, slope = jax.jvp(lambda q: xla.attend(q, *given_[1:], lengths, Call(pattern, SCALE)), (q,), (g,))
    np.testing.assert_allclose(jnp.vdot(slope, g), jnp.vdot(exact[1], g), rtol=1e-4)
    both = jax.vmap(lambda n: attend(*given_, n))(jnp.asarray([[1], [2]], jnp.int32))
    assert relative_error(both[1], exact[0]) < 2e-5 and not np.isnan(both).any()


@pytest.mark.parametrize("implementation", ["xla", "mosaic_tpu"])
def test_bfloat16_by_fraction(implementation):
    pattern = Pattern.sliding_window(4, 8, 3)
    options = dict(blocks=Blocks(*[(8, 8)] * 3), interpret=True) if implementation == "mosaic_tpu" else {}
    inputs = _inputs(pattern, dim=64, batch=1, dtype=jnp.bfloat16)
    got = _run(pattern, implementation, None, *inputs, **options)
    for ours, exact in zip(got, _exact(pattern, None, *inputs), strict=True):
        assert ours.dtype == jnp.bfloat16
        close = np.abs(np.asarray(ours).astype(np.float64) - exact) < 0.02 * np.abs(exact).max()
        assert close.mean() > 0.995


def test_vmap_and_remat():
    pattern = Pattern.sliding_window(3, 40, 2)  # too large to be gathered
    q, k, v, g = _inputs(pattern, batch=2)

    def loss(q, k, v):
        return jnp.sum(jax.checkpoint(lambda *x: chunk_attention(*x, pattern, scale=SCALE))(q, k, v) * g[:1])

    one = jax.jit(jax.vmap(jax.grad(loss, argnums=(0, 1, 2))))(*(x[:, None] for x in (q, k, v)))
    exact = _exact(pattern, None, q, k, v, jnp.broadcast_to(g[:1], g.shape))[1:]
    for ours, dense in zip(one, exact, strict=True):
        assert relative_error(ours[:, 0], dense) < 2e-5


@pytest.mark.parametrize("implementation, partly", [("xla", False), ("xla", True), ("mosaic_tpu", False)])
def test_shard_map_over_batch_and_heads(implementation, partly):
    from jax.sharding import Mesh, PartitionSpec as P

    pattern = Pattern.sliding_window(3, 40, 2)
    options = dict(blocks=Blocks(*[(40, 40)] * 3), interpret=True) if implementation == "mosaic_tpu" else {}
    inputs = _inputs(pattern, dim=64)
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("data", "tensor"))
    spec = P("data", None, "tensor", None)
    # Emulated kernels are ordinary loops, whose carries the check of shard_map does not accept.
    checked = implementation == "xla"
    lengths = _lengths(pattern) if partly else None
    run = functools.partial(_run.__wrapped__, pattern, implementation, lengths, **options)
    sharded = jax.jit(jax.shard_map(run, mesh=mesh, in_specs=(spec,) * 4, out_specs=(spec,) * 4, check_vma=checked))
    for ours, exact in zip(sharded(*inputs), _exact(pattern, lengths, *inputs), strict=True):
        assert relative_error(ours, exact) < 2e-5


@pytest.mark.parametrize("implementation, blocks", [("mosaic_tpu", (8, 8)), ("mosaic_gpu", (128, 64))])
def test_gradients_of_what_is_the_same_on_all_devices_are_summed(implementation, blocks):
    """As by XLA: a query of its own for every device, keys and values that all have."""
    from jax.sharding import Mesh, PartitionSpec as P

    if implementation == "mosaic_gpu" and not hasattr(plgpu, "InterpretGPUParams"):
        pytest.skip(f"jax {jax.__version__} cannot emulate GPU kernels, 0.11.2 can")
    q, k = (jax.ShapeDtypeStruct((n, 72, 1, 64), jnp.bfloat16) for n in (2, 1))

    def sums(**options):
        def loss(q, k, v):
            out = chunk_attention(q, k, v, Pattern.full(1, 72), **options)
            return jax.lax.psum(jnp.sum(out.astype(jnp.float32)), "d")

        split = dict(mesh=Mesh(np.array(jax.devices()[:2]), ("d",)), in_specs=(P("d"), P(), P()), out_specs=P())
        return str(jax.make_jaxpr(jax.grad(jax.shard_map(loss, **split), (0, 1, 2)))(q, k, k)).count("psum")

    kernels = dict(implementation=implementation, interpret=True, blocks=Blocks(blocks, blocks, blocks[::-1]))
    assert sums(**kernels) == sums(implementation="xla") == sums(implementation="reference") > 2


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda q, k, v, s: chunk_attention(q, k, v, Pattern.full(3, 2)), "the pattern has 3 query chunks"),
        (lambda q, k, v, s: chunk_attention(q, k, v, s, implementation="cuda"), "choose from .*, xla, "),
        (lambda q, k, v, s: chunk_attention(q, k, v, s, derivative="both"), 'must be "vjp" or "jvp"'),
        (lambda q, k, v, s: chunk_attention(q, k, v, s, implementation="mosaic_tpu"), "needs a TPU.*use xla or"),
        (lambda q, k, v, s: chunk_attention(q, k, v, s, implementation="cudnn"), "needs an NVIDIA GPU.*use xla"),
        (
            lambda q, k, v, s: chunk_attention(q, k, v, s, implementation="mosaic_tpu", interpret=True),
            "head dim is 8, not one of",
        ),
        (
            lambda q, k, v, s: chunk_attention(q, k, v, s, implementation="mosaic_tpu", derivative="jvp"),
            "gradients only, no forward mode; use xla",
        ),
    ],
)
def test_what_cannot_run_says_why(call, message):
    pattern = Pattern.full(2, 2)
    q, k, v, _ = _inputs(pattern)
    with pytest.raises((ValueError, UserError), match=message):
        call(q, k, v, pattern)


def test_the_best_implementation_depends_on_the_platform(monkeypatch):
    from greedy_distill_jax.ops.attention import select

    q = jnp.zeros((1, 2, 1, 128), jnp.bfloat16)
    for platform, dtype, expected in (
        ("cpu", jnp.bfloat16, "xla"),
        ("tpu", jnp.bfloat16, "mosaic_tpu"),
        ("gpu", jnp.bfloat16, "cudnn"),
        ("cuda", jnp.bfloat16, "cudnn"),
        ("gpu", jnp.float32, "xla"),
        ("METAL", jnp.float32, "xla"),
    ):
        monkeypatch.setattr(select, "device", lambda platform=platform: (platform, "some device"))
        assert select.choose(None, q.astype(dtype), Pattern.full(1, 2), function="f").name == expected
    monkeypatch.setattr(select, "device", lambda: ("tpu", "some device"))
    assert select.choose(None, q[..., :96], Pattern.full(1, 2), function="f").name == "xla"


def test_kernels_have_no_races(capfd):
    from jax.experimental.pallas import tpu as pltpu

    pattern = Pattern.from_table([(0,), (0, 1)], q_chunk=8, num_k_chunks=2)
    options = dict(blocks=Blocks(*[(8, 8)] * 3), interpret=pltpu.InterpretParams(detect_races=True))
    _check(pattern, "mosaic_tpu", heads=1, batch=1, dim=64, **options)
    assert "RACE DETECTED" not in "".join(capfd.readouterr())


@pytest.mark.parametrize("waits", [True, False])
def test_a_read_before_its_copy_has_come_is_seen_as_a_race(waits, capfd):
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    def kernel(x_ref, out_ref, buffer, semaphore):
        copy = pltpu.make_async_copy(x_ref, buffer, semaphore)
        copy.start()
        if waits:
            copy.wait()
        out_ref[...] = buffer[...]
        if not waits:
            copy.wait()

    x = jnp.ones((8, 128), jnp.float32)
    call = pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        in_specs=[pl.BlockSpec(memory_space=pl.ANY)],
        scratch_shapes=[pltpu.VMEM(x.shape, x.dtype), pltpu.SemaphoreType.DMA],
        interpret=pltpu.InterpretParams(detect_races=True),
    )
    try:
        call(x).block_until_ready()
        said = ""
    except jax.errors.JaxRuntimeError as error:  # jax 0.12 raises what earlier versions print
        said = str(error)
        assert "RACE DETECTED" in said, said
    assert ("RACE DETECTED" in "".join(capfd.readouterr()) + said) != waits
