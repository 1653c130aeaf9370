"""What the benchmark's workloads compute on a CPU, in FLOPs of their jaxprs, which are the same on every machine."""

import math

import jax
import pytest

from greedy_distill_jax.ops.attention import bench
from greedy_distill_jax.ops.attention.backends import xla
from greedy_distill_jax.pods import kernels
from greedy_distill_jax.testing.matmuls import _jaxprs, count_matmuls

SPECS = (kernels.CPU_PEERS, *kernels.CPU_GROWTH)


def _work(peer, spec, backward):
    """FLOPs of the program that the benchmark times."""
    return count_matmuls(lambda *qkvg: peer(spec, *qkvg)(backward)(), *spec.shapes())


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_nothing_outside_the_lists_is_computed(spec):
    """Two matmuls of the visible pairs forward, five more backward, and the output times its cotangent."""
    assert _work(bench.ours(), spec, backward=False) == spec.flops
    sums = 2 * math.prod(spec.shapes()[0].shape)
    assert _work(bench.ours(), spec, backward=True) == spec.flops * (1 + xla.BACKEND.backward_flops) + sums


def test_work_per_chunk_is_flat_and_far_below_masked_dense():
    def per_chunk(spec):
        return _work(bench.ours(), spec, backward=True) / spec.pattern.num_q_chunks

    short, *_, long = kernels.CPU_GROWTH
    assert per_chunk(long) < 1.02 * per_chunk(short)  # the first chunks of a video have a shorter window
    for backward, least in ((False, 8), (True, 7)):
        dense = _work(bench.masked_dense(), kernels.CPU_PEERS, backward)
        assert dense > least * _work(bench.ours(), kernels.CPU_PEERS, backward)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_memory_per_chunk_is_flat(backward):
    """The largest array is as long as the queries: no logits of the whole, no key list copied per query."""
    short, *_, long = kernels.CPU_GROWTH
    largest = [_largest(spec, backward) / spec.pattern.num_q_chunks for spec in (short, long)]
    assert largest[0] == largest[1]


def _largest(spec, backward):
    def sizes(jaxpr):
        for equation in jaxpr.eqns:
            yield from (x.aval.size for x in equation.outvars)
            for inner in _jaxprs(equation.params):
                yield from sizes(inner)

    jaxpr = jax.make_jaxpr(lambda *qkvg: bench.ours()(spec, *qkvg)(backward)())(*spec.shapes())
    return max(sizes(jaxpr.jaxpr))
