"""Collectives of compiled programs: a real one of libtpu with counts made by hand, and every form that is read."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from greedy_distill_jax.pods import hlo

# Compiled by libtpu 0.0.51 for v5e:2x2 (metadata cut), mesh x=2, y=2, everything bfloat16:
# - a scan over 3 microbatches [1024, 512], split over x, each the gradient of 6 layers tanh(a @ w) in a scan, with the
#   weights [6, 512, 512] split over x and y: all-gathers of one layer's weights forward and backward (the latter
#   asynchronous), an all-reduce over x of each layer's gradient;
# - the same gradient once more for one batch that is split over x and y: its gradients are reduce-scattered;
# - a loop to a bound that is an argument: tanh of a collective-permute of a block [512, 256];
# - a conditional: all-gather and collective-permute of such a block, or the latter alone.
PROGRAM = (pathlib.Path(__file__).parent / "golden" / "tpu_program.txt").read_text()
LAYER, BLOCK = 512 * 512 * 2, 512 * 256 * 2  # bytes
STEPS = 10.0


def test_a_program_of_libtpu():
    found = hlo.counts(PROGRAM, STEPS)
    gathers = (3 + 1) * 6 * 2
    assert (found["all-gather"].instructions, found["all-gather"].runs) == (5, gathers + 1)
    assert found["all-gather"].bytes == gathers * LAYER * 3 / 4 + BLOCK
    assert (found["all-reduce"].runs, found["all-reduce"].bytes) == (3 * 6, 3 * 6 * 2 * LAYER / 2)
    assert (found["reduce-scatter"].runs, found["reduce-scatter"].bytes) == (6, 6 * LAYER * 3 / 4)
    assert (found["collective-permute"].runs, found["collective-permute"].bytes) == (STEPS + 1, (STEPS + 1) * BLOCK)
    assert found["all-to-all"].runs == found["kernels"].runs == 0
    for count in found.values():
        assert sum(count.sources.values()) == count.bytes
    assert found["all-gather"].sources == {
        "unnamed bf16[1,512,512]": gathers * LAYER * 3 / 4,
        "unnamed bf16[512,512]": BLOCK,
    }


def test_what_is_sent_says_where_it_comes_from():
    name = 'metadata={op_name="jit(step)/while/body/blocks/attention/all_gather" stack_frame_id=5}'
    text = loop().replace("source_target_pairs={{0,1},{1,0}}", f"source_target_pairs={{{{0,1}},{{1,0}}}}, {name}")
    assert hlo.counts(text)["collective-permute"].sources == {"attention/all_gather f32[]": 28.0}


def test_a_loop_to_a_bound_at_run_time_is_no_guess():
    with pytest.raises(ValueError, match=r"how often the loop while\.\d+ runs is decided at run time"):
        hlo.counts(PROGRAM)


def test_an_asynchronous_collective_that_never_starts_is_an_error():
    with pytest.raises(ValueError, match="go on but never start"):
        hlo.counts(PROGRAM.replace("AsyncCollectiveStart", "AsyncCollectiveOther"), STEPS)


@pytest.mark.parametrize(
    "groups, size",
    [
        ("{{0,1,2,3}}", 4),
        ("{{0,2},{1,3}}", 2),
        ("{}", 8),
        ("[2,2]<=[4]", 2),
        ("[4,16]<=[16,4]T(1,0)", 16),
        ("mesh['axis_0'=4] {'axis_0'}", 4),
        ("mesh['a'=2,'b'=4,'c'=8] {'a','c'}", 16),
        ("mesh['a'=16,'b'=4] {'a':(1)4,'b'}", 16),
    ],
)
def test_groups(groups, size):
    assert hlo.group_size(f", channel_id=1, replica_groups={groups}, dimensions={{0}}", 8) == size


@pytest.mark.parametrize("groups", ["replica_groups=<new>, x", "channel_id=1", "replica_groups=mesh['a'=2] {'b'}"])
def test_groups_that_are_not_understood(groups):
    with pytest.raises(ValueError, match="hlo: "):
        hlo.group_size(f", {groups}", 8)


def loop(*, first="0", step="1", bound="7", compare="compare(%i.1, %n.1), direction=LT", carried=False, fused=False):
    """A loop around one collective-permute of 4 bytes."""
    state = "(s32[], s32[], f32[])"
    condition = f"  %n.1 = s32[] {'get-tuple-element(%q), index=1' if carried else f'constant({bound})'}\n"
    condition += (
        "  ROOT %c.1 = pred[] fusion(%i.1, %n.1), kind=kLoop, calls=%compared\n"
        if fused
        else f"  ROOT %c.1 = pred[] {compare}\n"
    )
    return f"""HloModule loop, num_partitions=4

%compared (a: s32[], b: s32[]) -> pred[] {{
  %b = s32[] parameter(1)
  %a = s32[] parameter(0)
  ROOT %c.2 = pred[] compare(%b, %a), direction=GT
}}

%body (p: {state}) -> {state} {{
  %p = {state} parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %n = s32[] get-tuple-element(%p), index=1
  %x = f32[] get-tuple-element(%p), index=2
  %one = s32[] constant({step})
  %next = s32[] add(%i, %one)
  %y = f32[] collective-permute(%x), channel_id=1, source_target_pairs={{{{0,1}},{{1,0}}}}
  ROOT %t = {state} tuple(%next, %n, %y)
}}

%condition (q: {state}) -> pred[] {{
  %q = {state} parameter(0)
  %i.1 = s32[] get-tuple-element(%q), index=0
{condition}}}

ENTRY %main (x: f32[], m: s32[]) -> f32[] {{
  %x.1 = f32[] parameter(0)
  %m = s32[] parameter(1)
  %zero = s32[] constant({first})
  %moving = (s32[], s32[], u32[]) copy-start(%zero)
  %start = s32[] copy-done(%moving)
  %seven = s32[] constant({bound})
  %s = {state} tuple(%start, %seven, %x.1)
  %w = {state} while(%s), condition=%condition, body=%body
  ROOT %r = f32[] get-tuple-element(%w), index=2
}}
"""


@pytest.mark.parametrize(
    "runs, options",
    [
        (7, {}),
        (7, dict(carried=True)),
        (7, dict(fused=True)),
        (8, dict(compare="compare(%i.1, %n.1), direction=LE")),
        (7, dict(compare="compare(%n.1, %i.1), direction=GT")),
        (5, dict(first="2")),
        (4, dict(step="2")),
        (6, dict(first="6", step="-1", bound="0", compare="compare(%i.1, %n.1), direction=GT")),
        (7, dict(first="6", step="-1", bound="0", compare="compare(%i.1, %n.1), direction=GE")),
        (7, dict(compare="compare(%i.1, %n.1), direction=NE")),
    ],
)
def test_trips_of_a_loop(runs, options):
    found = hlo.counts(loop(**options))["collective-permute"]
    assert (found.instructions, found.runs, found.bytes) == (1, runs, 4 * runs)


def test_a_bound_that_the_body_changes_is_unknown():
    text = loop(carried=True).replace("tuple(%next, %n, %y)", "tuple(%next, %next, %y)")
    assert hlo.counts(text, 2.5)["collective-permute"].runs == 2.5


def test_a_collective_that_is_called_in_an_unread_way_is_an_error():
    text = loop().replace("while(%s), condition=%condition, body=%body", "other(%s), run=%body")
    with pytest.raises(ValueError, match="collective-permute in the computation body"):
        hlo.counts(text)


def test_a_program_of_this_machine():
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]), ("x",))
    split, whole = (jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*p)) for p in (("x",), ()))

    def call(x):
        return jax.lax.scan(lambda c, _: (jax.lax.with_sharding_constraint(c * 2, whole)[:4] + c, None), x, length=3)[0]

    compiled = jax.jit(call, in_shardings=split, out_shardings=split).lower(jnp.zeros((4, 8))).compile()
    assert sum(count.runs for count in hlo.counts(compiled.as_text()).values()) >= 1
