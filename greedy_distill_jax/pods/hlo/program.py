"""A program from its entry down: what its loops, branches and calls come to.

Counted are collectives and kernel calls. A loop without a constant bound (the denoising steps of a rollout, up to a
random exit) counts as often as the caller says. What is not understood is an error: counting it as nothing would be an
answer, too.
"""

import re

from greedy_distill_jax.pods.hlo.collectives import KINDS, UNREAD, Count, group_size, sent_bytes
from greedy_distill_jax.pods.hlo.parse import SHAPE, Computation, Instruction, parse, shape_bytes
from greedy_distill_jax.pods.hlo.trips import At, Integers, Known, Value

_SOURCE = re.compile(r'op_name="([^"]*)"')
# Pallas kernels for TPUs and GPUs, cuDNN's attention, and what stands in for that (``Backend.stand_in``).
_KERNELS = re.compile(r'custom_call_target="(?:tpu_custom_call|mosaic_gpu\w*|__cudnn\$fmha\w*|stand_in_\w+)"')
_UNDER_WAY = re.compile(r'"async_collective_fusion_config":\{"flag_start":"\d')


def counts(text: str, unknown: float | int | None = None) -> dict[str, Count]:
    """Returns {kind: Count} of the collectives, and under "kernels" of attention's kernels.

    Of a conditional the branch that sends most is counted.

    Args:
      text: ``compiled.as_text()``.
      unknown: runs of a loop whose bound is decided at run time; None takes such a loop for an error.

    Raises:
      ValueError: something in the program is not understood, or a loop has no constant bound and ``unknown`` is None.
    """
    program = _Program(text, unknown)
    out = program.counts(program.module.entry, lambda value: value if isinstance(value, int) else None)
    program.check()
    return out


class _Program:
    """One pass over a program; ``visited`` and the two sets of asynchronous collectives show what it missed."""

    def __init__(self, text: str, unknown: float | int | None):
        self.module = parse(text)
        self.integers = Integers(self.module.computations)
        self.unknown, self.visited = unknown, set()
        self.started, self.continued = set(), set()  # (kind, channel) of asynchronous fusions

    def counts(self, name: str, known: Known) -> dict[str, Count]:
        """Of one run of a computation; ``known`` gives the integers behind its parameters."""
        computation, out = self.module.computations[name], {kind: Count() for kind in (*KINDS, "kernels")}
        self.visited.add(name)

        def include(other: dict[str, Count], times: float | int = 1) -> None:
            for kind, count in other.items():
                out[kind].add(count, times)

        for one in computation.body.values():
            kind = one.op.removesuffix("-start")
            if kind in UNREAD:
                raise ValueError(f"hlo: {one.op} is not among hlo.KINDS.")
            if kind in KINDS:
                include(self.collective(computation, one, kind))
            elif one.op == "custom-call" and _KERNELS.search(one.rest):
                include({"kernels": Count(1, 1.0)})
            elif one.op == "while":
                # The condition runs once more than the body, but sends nothing in what XLA makes of our loops.
                trips, inside = self.trips(computation, one, known), self.carried(computation, one, known)
                include(self.counts(one.called("body"), inside), trips)
                include(self.counts(one.called("condition"), inside), trips)
            elif one.op == "conditional":
                include(self.largest(computation, one, known))
            elif one.op in ("fusion", "call", "async-start"):
                include(self.counts(one.body, self.handed(computation, one.operands, known)))
        return out

    def handed(self, computation: Computation, arguments: list[str], known: Known) -> Known:
        """Returns ``known`` for a computation that is called with these arguments."""
        return lambda value: known(self.integers.outside(computation, arguments, value))

    def carried(self, computation: Computation, loop: Instruction, known: Known) -> Known:
        """Returns ``known`` for body and condition of a loop: only what no run changes has one value in all runs."""
        start = self.handed(computation, loop.operands, known)

        def inside(value: Value) -> int | None:
            return None if isinstance(value, At) and not self.integers.unchanged(loop, value.path) else start(value)

        return inside

    def trips(self, computation: Computation, loop: Instruction, known: Known) -> float | int:
        """How often a loop runs, ``unknown`` times where nobody can know."""
        trips = self.integers.trips(computation, loop, known)
        if trips is None and self.unknown is None:
            raise ValueError(f"hlo: how often the loop {loop.name} runs is decided at run time.")
        return self.unknown if trips is None else trips

    def largest(self, computation: Computation, one: Instruction, known: Known) -> dict[str, Count]:
        """Counts the branch of a conditional that sends most: the program sends at most that."""
        found = [
            self.counts(name, self.handed(computation, [operand], known))
            for name, operand in zip(one.branches, one.operands[1:], strict=True)
        ]
        return max(found, key=lambda branch: (sum(c.bytes for c in branch.values()), branch["kernels"].runs))

    def collective(self, computation: Computation, one: Instruction, kind: str) -> dict[str, Count]:
        """Counts one run of a collective.

        libtpu runs some beside other work: the same collective then stands in a fusion that starts it, in those that
        compute meanwhile, and in one that waits for it. It is counted where it starts. And libtpu writes a
        reduce-scatter as an all-reduce of which a fusion keeps one slice.
        """
        users = [other for other in computation.body.values() if one.name in other.operands]
        targets = [m[1] for user in users if (m := re.search(r'custom_call_target="(\w+)"', user.rest))]
        channel = re.search(r"channel_id=(\d+)", one.rest)
        identity = (kind, channel[1] if channel else one.name)
        if "AsyncCollectiveStart" in targets:
            self.started.add(identity)
        elif (
            "AsyncCollectiveDone" in targets
            or computation.name.startswith("async_collective_fusion")
            or _UNDER_WAY.search(one.rest)
        ):
            self.continued.add(identity)
            return {}
        if kind == "all-reduce" and "all-reduce-scatter" in computation.name:
            kind = "reduce-scatter"
        operand = sum(shape_bytes(computation.body[name].shape) for name in one.operands)
        group = 1 if kind == "collective-permute" else group_size(one.rest, self.module.devices)
        sent = sent_bytes(kind, operand, group)
        named = _SOURCE.search(one.rest)
        source = "/".join(named[1].split("/")[-2:]) if named else "unnamed"
        return {kind: Count(1, 1.0, sent, {f"{source} {SHAPE.search(one.shape)[0]}": sent})}

    def check(self) -> None:
        """Raises ValueError when a collective would have been left out."""
        lost = self.continued - self.started
        if lost:
            raise ValueError(f"hlo: collectives that go on but never start (kind, channel): {sorted(lost)}.")
        for name, computation in self.module.computations.items():
            ops = [one.op for one in computation.body.values() if one.op.removesuffix("-start") in (*KINDS, *UNREAD)]
            if ops and name not in self.visited:
                raise ValueError(f"hlo: {ops[0]} in the computation {name}, which is called in no way that is read.")
