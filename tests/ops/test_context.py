"""Frames split over devices give the numbers of one device, and only the window's halo and the sink travel."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec as P

from greedy_distill_jax.errors import UserError
from greedy_distill_jax.ops.attention import Schedule
from greedy_distill_jax.ops.attention.context import context_attention, plan
from greedy_distill_jax.testing.attention import dense_attention, relative_error


@pytest.mark.parametrize(
    "schedule, devices",
    [
        (Schedule.sliding_window(8, 2, window=4, sink=1), 4),  # the halo is longer than a device's own chunks
        (Schedule.from_table([(7,), (), (0, 1, 5), (3,)], q_chunk=3, k_chunk=2, num_k_chunks=8), 4),
    ],
)
def test_split_frames_equal_one_device(schedule, devices):
    rng = np.random.default_rng(0)
    length, slots = schedule.num_q_chunks * schedule.q_chunk, schedule.num_k_chunks * schedule.k_chunk
    inputs = [rng.standard_normal((2, n, 2, 8)).astype(np.float32) for n in (length, slots, slots, length)]
    mesh = Mesh(np.array(jax.devices()[: 2 * devices]).reshape(2, devices), ("data", "context"))

    def run(q, k, v, g):
        out, pull = jax.vjp(lambda *x: context_attention(*x, schedule, "context", scale=0.3), q, k, v)
        return out, *pull(g)

    spec = P("data", "context")
    got = jax.jit(jax.shard_map(run, mesh=mesh, in_specs=(spec,) * 4, out_specs=(spec,) * 4))(*inputs)
    for ours, exact in zip(got, dense_attention(*inputs[:3], schedule.dense_mask(), 0.3, inputs[3]), strict=True):
        assert relative_error(ours, exact) < 2e-5


def test_only_the_halo_and_the_sink_travel():
    window, sink, devices = 4, 1, 4
    for frames in (16, 32, 64):
        exchange = plan(Schedule.sliding_window(frames, 1, window, sink), devices)
        assert exchange.chunks_sent == (devices - 1) * (window - 1) + (devices - 1) * sink
        assert exchange.slots == window - 1 + sink
    assert plan(Schedule.sliding_window(8, 1, window=1), devices).chunks_sent == 0


def test_frames_that_do_not_divide():
    with pytest.raises(UserError, match="6 query chunks do not divide by 4 devices"):
        plan(Schedule.sliding_window(6, 1, 2), 4)


def test_rows_of_one_device_only():
    """No mask is made where all devices see the same."""
    schedule = Schedule.from_table([(0,), (1,), (2,), (3,)], q_chunk=2, num_k_chunks=4)
    x = jnp.ones((1, 8, 1, 8))
    mesh = Mesh(np.array(jax.devices()[:2]), ("context",))
    call = jax.shard_map(
        lambda x: context_attention(x, x, x, schedule, "context"), mesh=mesh, in_specs=P(None, "context"),
        out_specs=P(None, "context"),
    )  # fmt: skip
    assert "ppermute" not in str(jax.make_jaxpr(call)(x))
    np.testing.assert_allclose(call(x), x, rtol=1e-6)
