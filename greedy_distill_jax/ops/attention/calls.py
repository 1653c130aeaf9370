"""Which attention a program calls: a record of what is traced."""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

from greedy_distill_jax.ops.attention import backends
from greedy_distill_jax.ops.attention.backends.record import Backend


class Recorded(NamedTuple):
    """One call of the attention op, as it was traced."""

    backend: str
    queries: tuple[int, ...]  # [B, L, N, K]
    keys: int
    pairs: int  # of tokens
    lengths: bool  # lists are visible in part, known at run time
    dtype: str
    stand_in: bool  # a call of the same shapes that computes nothing stands in for it


@contextlib.contextmanager
def recorded_calls(stand_ins: bool = False) -> Iterator[list[Recorded]]:
    """The attention calls that are traced meanwhile, in their order.

    Args:
      stand_ins: calls of a backend that has a stand-in (``record.Backend``) are traced as that.
    """
    calls, before = [], backends.BACKENDS

    def watched(backend: Backend) -> Backend:
        stands_in = stand_ins and backend.stand_in is not None

        def note(form):
            def call(q, k, v, lengths_Q, static):
                pairs, hidden = static.pattern.pairs, lengths_Q is not None
                calls.append(Recorded(backend.name, q.shape, k.shape[1], pairs, hidden, str(q.dtype), stands_in))
                return form(q, k, v, lengths_Q, static)

            return call

        forward = backend.forward and note(backend.forward)
        attend = backend.stand_in if stands_in else backend.attend
        return dataclasses.replace(backend, attend=note(attend), forward=forward)

    backends.BACKENDS = tuple(map(watched, before))
    try:
        yield calls
    finally:
        backends.BACKENDS = before
