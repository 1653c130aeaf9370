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


@contextlib.contextmanager
def recorded_calls() -> Iterator[list[Recorded]]:
    """The attention calls that are traced meanwhile, in their order."""
    calls, before = [], backends.BACKENDS

    def watched(backend: Backend) -> Backend:
        def note(form):
            def call(q, k, v, lengths_Q, static):
                pairs, hidden = static.pattern.pairs, lengths_Q is not None
                calls.append(Recorded(backend.name, q.shape, k.shape[1], pairs, hidden, str(q.dtype)))
                return form(q, k, v, lengths_Q, static)

            return call

        forward = backend.forward and note(backend.forward)
        return dataclasses.replace(backend, attend=note(backend.attend), forward=forward)

    backends.BACKENDS = tuple(map(watched, before))
    try:
        yield calls
    finally:
        backends.BACKENDS = before
