"""The Hopper kernels emulated, against a float64 oracle, and the tables that tell them what to compute."""

import dataclasses
import importlib.util
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, strategies as st
from jax.experimental.pallas import mosaic_gpu as plgpu

from greedy_distill_jax.errors import UserError
from greedy_distill_jax.ops.attention import Pattern, aot, chunk_attention, select, tuning
from greedy_distill_jax.ops.attention.backends import mosaic_gpu
from greedy_distill_jax.ops.attention.backends.hopper import parts, tables
from greedy_distill_jax.ops.attention.tuning import Blocks
from greedy_distill_jax.pods import compile_kernels, kernels
from greedy_distill_jax.testing.attention import errors

emulated = pytest.mark.skipif(
    not hasattr(plgpu, "InterpretGPUParams"), reason=f"jax {jax.__version__} cannot emulate GPU kernels, 0.11.2 can"
)
needs_plugin = pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda13_plugin") is None, reason="jax's compiler for NVIDIA cards is not installed"
)
SMALL = Blocks((128, 64), (128, 64), (64, 128))
LISTS = Pattern.from_table([(1,), (), (2, 0)], q_chunk=72, k_chunk=136, num_k_chunks=3)


@pytest.fixture
def few_sms(monkeypatch):
    """A card so small that splitting tiles pays."""
    for name, value in (("SMS", 5), ("MERGING", 0), ("PART", 0)):
        monkeypatch.setattr(tables, name, value)
    tables.schedule.cache_clear()
    yield
    tables.schedule.cache_clear()


# --- tables -------------------------------------------------------------------------------------------------------


@st.composite
def patterns(draw):
    num_k, multiple = draw(st.integers(1, 5)), st.integers(1, 6)
    rows = draw(st.lists(st.sets(st.integers(0, num_k - 1)), min_size=1, max_size=4))
    rows = [draw(st.permutations(sorted(row))) for row in rows]
    chunks = dict(q_chunk=8 * draw(multiple), k_chunk=8 * draw(multiple))
    return Pattern.from_table(rows, **chunks, num_k_chunks=num_k)


@given(patterns(), st.sampled_from([16, 32, 64]), st.booleans(), st.integers(0, 9))
def test_visits_are_the_pairs_of_the_table(pattern, block, keys, seed):
    """Each once, full ones first, by query and by key, with and without lengths that are known at run time."""
    lengths = np.random.default_rng(seed).integers(0, [len(row) + 1 for row in pattern.table])
    seen = dataclasses.replace(pattern, table=tuple(row[:n] for row, n in zip(pattern.table, lengths)))
    rows = tables.by_key(pattern) if keys else tables.by_query(pattern)
    chunk = pattern.q_chunk if keys else pattern.k_chunk
    counts = tables.visible(pattern, rows, jnp.asarray(lengths, jnp.int32), keys=keys)
    for expected, counted in ((pattern, None), (seen, counts)):
        visits, work = tables.visits(rows, chunk, block, counted)
        mask = expected.dense_mask().T if keys else expected.dense_mask()
        outer = mask.shape[0] // len(rows)
        for i, found in enumerate(mask[::outer].astype(int)):
            covered = np.zeros(len(found) + block, int)
            for n in range(visits.total[i]):
                assert (visits.valid[i, n] == block) == (n < visits.full[i])
                covered[visits.starts[i, n] : visits.starts[i, n] + visits.valid[i, n]] += 1
            np.testing.assert_array_equal(covered[: len(found)], found)
        assert all(total <= most for total, most in zip(visits.total, work))


@given(st.lists(st.integers(0, 40), min_size=1, max_size=5), st.integers(1, 3), st.integers(1, 3), st.booleans())
def test_parts_are_every_visit_once(work, batch, tiles, may_split):
    plan = tables.schedule(tuple(work), batch, 2, tiles, may_split=may_split)
    done = np.zeros((batch, len(work), 2, tiles, max(work) + 1), int)
    for *place, first, end in plan.parts.tolist():
        done[(*place, slice(first, end))] += 1
        done[(*place, -1)] += 1
    assert (
        done[..., :-1].sum((0, 2, 3)) == [[batch * 2 * tiles * (j < n) for j in range(max(work))] for n in work]
    ).all()
    assert done.max(initial=0, where=np.arange(max(work) + 1) < max(work)) <= 1
    assert (done[..., -1] >= 1).all(), "a tile without a visit is written as well"
    assert plan.bounds[0] == 0 and plan.bounds[-1] == len(plan.parts) and (np.diff(plan.bounds) >= 0).all()
    assert plan.split or len(plan.bounds) == len(plan.parts) + 1


def test_a_frame_in_twelve_heads_is_split_and_many_tiles_are_not():
    """One frame of 1560 tokens in 12 heads is 156 tiles: two rounds of 132, of which the second is mostly empty."""
    stream = tables.schedule((49,), 1, 12, 13, may_split=True)
    loads = [stream.parts[a:b, 5].sum() - stream.parts[a:b, 4].sum() for a, b in zip(stream.bounds, stream.bounds[1:])]
    assert stream.split and max(loads) == 58 and len(loads) == tables.SMS
    assert not tables.schedule((49,), 1, 40, 13, may_split=True).split, "520 tiles are 3.9 rounds"


# --- kernels ------------------------------------------------------------------------------------------------------


def _check(pattern, lengths=None, *, dim=64, batch=1, heads=2, interpret=True, blocks=SMALL):
    rng = np.random.default_rng(0)
    q_tokens, k_tokens = pattern.q_tokens, pattern.k_tokens
    q, k, v, g = (
        jnp.asarray(rng.standard_normal((batch, n, heads, dim)), jnp.bfloat16)
        for n in (q_tokens, k_tokens, k_tokens, q_tokens)
    )
    count = None if lengths is None else jnp.asarray(lengths, jnp.int32)
    options = dict(implementation="mosaic_gpu", interpret=interpret, blocks=blocks, lengths_Q=count)
    seen = pattern
    if lengths is not None:
        rows = tuple(row[:n] for row, n in zip(pattern.table, lengths, strict=True))
        seen = dataclasses.replace(pattern, table=rows)
    found = errors(lambda *qkv: chunk_attention(*qkv, pattern, **options), (q, k, v, g), seen.dense_mask())
    assert all(error < 8e-3 for error in found.values()), found


@emulated
def test_lists_equal_dense_and_nothing_races(capfd):
    """Chunks that blocks do not divide, runs of neighbours, a query that sees nothing, a head dim of 128."""
    _check(LISTS, interpret=plgpu.InterpretGPUParams(detect_races=True))
    assert "RACE DETECTED" not in "".join(capfd.readouterr())
    _check(Pattern.sliding_window(3, 40, 2), dim=128, heads=1, batch=2)


@emulated
def test_lengths_at_run_time_equal_dense():
    _check(Pattern.from_table([(1, 2, 0), (2, 0, 1)], q_chunk=72, k_chunk=136, num_k_chunks=3), lengths=(2, 0), heads=1)


@emulated
@pytest.mark.parametrize("pattern", [Pattern.full(1, 200, 3, 136), LISTS], ids=["stream", "lists"])
def test_parts_of_tiles_are_merged_and_nothing_races(few_sms, pattern, capfd):
    visits, work = tables.visits(tables.by_query(pattern.merged()), pattern.merged().k_chunk, 64)
    assert tables.schedule(work, 1, 1, -(-pattern.merged().q_chunk // 128), may_split=True).split
    _check(pattern, heads=1, interpret=plgpu.InterpretGPUParams(detect_races=True))
    assert "RACE DETECTED" not in "".join(capfd.readouterr())


class _Hasty:
    """``plgpu`` for a warpgroup that does not wait until what it loaded was used, neither for a slot nor at its end."""

    barrier_wait = staticmethod(lambda barrier: None)

    def __getattr__(self, name):
        return getattr(plgpu, name)


@emulated
def test_a_load_into_a_slot_in_use_is_seen_as_a_race(benchmarks, monkeypatch):
    """Of three visits the last takes the slot of the first."""
    parity, pattern = benchmarks("kernel_parity"), Pattern.full(1, 136, 3, 64)
    assert not parity.parity(pattern, None, 64, np.random.default_rng(0))["races"]
    monkeypatch.setattr(parts, "plgpu", _Hasty())
    assert parity.parity(pattern, None, 64, np.random.default_rng(0))["races"]


@emulated
def test_what_is_not_a_number_stays_where_it_is(few_sms):
    """In one example of several whose tiles are in parts, and in slots that are free."""
    pattern, options = Pattern.full(1, 136, 3, 72), dict(implementation="mosaic_gpu", interpret=True, blocks=SMALL)
    q, k = (jnp.ones((2, n, 1, 64), jnp.bfloat16) for n in (136, 216))
    out = chunk_attention(q.at[0].set(jnp.nan), k, k, pattern, **options)
    assert np.isnan(np.float32(out[0])).all() and (np.float32(out[1]) == 1).all()
    free = k.at[:, 72:].set(jnp.nan)
    out = chunk_attention(q, free, free, pattern, lengths_Q=jnp.asarray([1], jnp.int32), **options)
    assert (np.float32(out) == 1).all()


@emulated
def test_three_warpgroups_equal_dense():
    _check(Pattern.full(1, 200, 2, 72), heads=1, blocks=Blocks((192, 64), (192, 64), (64, 192)))


@emulated
def test_the_table_of_errors(benchmarks, tmp_path, monkeypatch):
    parity, output = benchmarks("kernel_parity"), tmp_path / "parity"
    options = ["--only=sdd step", "--tokens=8", "--frames=3", "--dim=64", f"--output={output}"]
    assert parity.main([*options, "--limit=1e-9"]) == 1
    rows = json.loads(output.with_suffix(".json").read_text())["rows"]
    assert [row["call"] for row in rows] == ["sdd step", "sdd step, 2 of 4 slots"]
    assert all(0 < row[name] < 8e-3 and not row["races"] for row in rows for name in parity.OUTPUTS)
    for changes, code in (({}, 0), ({"dv": float("nan")}, 1), ({"races": True}, 1)):
        row = dict.fromkeys(parity.OUTPUTS, 1e-3) | {"races": False} | changes
        with monkeypatch.context() as patch:
            patch.setattr(parity, "parity", lambda *args, row=row: row)
            assert parity.main(options) == code

    def races(*args, **kwargs):
        raise RuntimeError("callback failed: RACE DETECTED")

    monkeypatch.setattr(parity, "chunk_attention", races)
    assert parity.main(options) == 1
    for bad, line in (("--only=nothing", "which no call has in its name"), ("--frames=2", "student has 3")):
        with pytest.raises(UserError, match=line):
            parity.main([bad])


def test_an_old_jax_prints_no_table_of_errors(benchmarks, monkeypatch):
    monkeypatch.delattr(plgpu, "InterpretGPUParams", raising=False)
    with pytest.raises(UserError, match=f"this is jax {jax.__version__}, which cannot emulate GPU kernels"):
        benchmarks("kernel_parity").main([])


@needs_plugin
def test_kernels_are_assembled_for_cards_that_are_not_there(benchmarks):
    """For sm_90a, without a spill: of a stream's call in parts, and of a table with all block sizes that are tried."""
    specs = {name: kernels.SPECS[f"1.3b 480p {name}"] for name in ("causal step", "etm")}
    assert _plan(specs["causal step"]).split and not _plan(specs["etm"]).split
    tried = [(specs["causal step"], mosaic_gpu.BLOCKS)]
    tried += [(specs["etm"], blocks) for blocks in benchmarks("device_items.tune").TRIED]
    seen = set()
    for spec, blocks in tried:
        made = aot.compile_spec(spec, aot.target_mesh("h200"), blocks=blocks)["assembled"]
        # A kernel that was assembled before is not assembled again.
        wanted = {(spec, name, getattr(blocks, kernel.blocks)) for name, kernel in mosaic_gpu.KERNELS.items()} - seen
        assert made.keys() == {name for _, name, _ in wanted} and not compile_kernels.spills(made), (blocks, made)
        seen |= wanted


def test_a_kernel_that_spills_is_named_with_a_remedy():
    made = {"dq_kernel": {"registers": 168, "spilled": 8}, "fwd_kernel": {"registers": 168, "spilled": 0}}
    (line,) = compile_kernels.spills(made)
    assert line.startswith("dq_kernel spills 8 bytes") and "change its block sizes" in line


def _plan(spec):
    _, work = tables.visits(tables.by_query(spec.pattern.merged()), spec.pattern.merged().k_chunk, 128)
    return tables.schedule(work, 1, spec.heads, -(-spec.pattern.merged().q_chunk // 128), may_split=True)


# --- where it runs ------------------------------------------------------------------------------------------------


@pytest.fixture
def new_jax(monkeypatch):
    """Whatever jax this is, the kernels are for it."""
    monkeypatch.setattr(plgpu, "InterpretGPUParams", getattr(plgpu, "InterpretGPUParams", None), raising=False)


def _choose(name=None, tokens=1560, dim=128, dtype=jnp.bfloat16):
    pattern = Pattern.full(1, tokens)
    return select.choose(name, jnp.zeros((1, tokens, 1, dim), dtype), pattern, function="f").name


def test_it_is_the_default_only_where_a_measurement_says_so(monkeypatch, new_jax):
    monkeypatch.setattr(select, "device", lambda: ("gpu", "NVIDIA H200"))
    name = tuning.key(1560, 1560, 128, "bfloat16")
    for record, expected in (({}, "cudnn"), ({"fastest": [name]}, "mosaic_gpu")):
        monkeypatch.setattr(tuning, "record", lambda target, record=record: record)
        assert _choose() == expected
        assert _choose(tokens=3600) == "cudnn"
    assert _choose("mosaic_gpu", tokens=3600) == "mosaic_gpu", "by name it runs without"
    frame = jnp.zeros((1, 3600, 1, 128), jnp.bfloat16)
    (why,) = select.passed_over(frame, Pattern.full(1, 3600)).values()
    assert why == "tuned/h200.json does not say that it is the fastest for 3600x3600 dim 128 bfloat16"
    assert not select.passed_over(frame.astype(jnp.float32), Pattern.full(1, 3600)), "none but XLA's can run"


@pytest.mark.parametrize(
    "kind, options, why",
    [
        ("NVIDIA A100-SXM4-80GB", {}, "needs an NVIDIA H100 or H200 and this is NVIDIA A100-SXM4-80GB"),
        ("NVIDIA GH200 480GB", {}, "needs an NVIDIA H100 or H200"),
        ("NVIDIA H100 80GB HBM3", dict(dim=96), "head dim is 96"),
        ("NVIDIA H100 80GB HBM3", dict(dtype=jnp.float32), "dtype is float32"),
        ("NVIDIA H100 80GB HBM3", dict(tokens=1350), "1350 and 1350 tokens, not multiples of 8"),
    ],
)
def test_where_it_cannot_run_it_says_why(monkeypatch, new_jax, kind, options, why):
    monkeypatch.setattr(select, "device", lambda: ("gpu", kind))
    with pytest.raises(UserError, match=why):
        _choose("mosaic_gpu", **options)


def test_an_old_jax_is_named(monkeypatch):
    monkeypatch.setattr(select, "device", lambda: ("gpu", "NVIDIA H200"))
    monkeypatch.delattr(plgpu, "InterpretGPUParams", raising=False)
    with pytest.raises(UserError, match=f"this is jax {jax.__version__}; the kernels need 0.11.2"):
        _choose("mosaic_gpu")


@pytest.mark.parametrize("bad", [dict(forward=(160, 64)), dict(forward=(64, 64)), dict(forward=(128, 100))], ids=str)
def test_blocks_that_the_kernels_do_not_have_are_refused(monkeypatch, new_jax, bad):
    """They would leave rows unwritten."""
    monkeypatch.setattr(select, "device", lambda: ("gpu", "NVIDIA H200"))
    blocks, q = dataclasses.replace(SMALL, **bad), jnp.zeros((1, 144, 1, 64), jnp.bfloat16)
    with pytest.raises(UserError, match=f"blocks of {bad['forward'][0]} queries x {bad['forward'][1]} keys"):
        chunk_attention(q, q, q, Pattern.full(2, 72), implementation="mosaic_gpu", blocks=blocks)


def test_blocks_of_a_tuned_table_are_taken(monkeypatch):
    tuned = {"blocks": {tuning.key(1560, 1560, 128, "bfloat16"): dict(forward=[192, 64], dq=[128, 96], dkv=[64, 128])}}
    monkeypatch.setattr(tuning, "record", lambda target: tuned if target == "h200" else {})
    window = Pattern.sliding_window(4, 1560, 2)
    assert mosaic_gpu.blocks("NVIDIA H200", window, 128, "bfloat16") == Blocks((192, 64), (128, 96), (64, 128))
    assert mosaic_gpu.blocks("NVIDIA H200", Pattern.full(1, 1560, 4), 128, "bfloat16") == mosaic_gpu.BLOCKS
    assert mosaic_gpu.blocks("NVIDIA H100 80GB HBM3", window, 128, "bfloat16") == mosaic_gpu.BLOCKS
