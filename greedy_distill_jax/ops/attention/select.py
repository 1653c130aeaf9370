"""Which backend runs: the best one that can, or the named one if it can."""

from typing import Any

import jax

from greedy_distill_jax.errors import UserError
from greedy_distill_jax.ops.attention import backends
from greedy_distill_jax.ops.attention.backends.record import Backend, Request
from greedy_distill_jax.ops.attention.pattern import Pattern


def device() -> tuple[str, str]:
    """(platform, device kind) that the code being traced is for: the ambient abstract mesh's, else the default one."""
    ambient = jax.sharding.get_abstract_mesh().abstract_device
    if ambient is not None:
        return ambient.platform, ambient.device_kind
    return jax.default_backend(), jax.devices()[0].device_kind


def choose(
    name: str | None,
    q_BLNK: Any,
    pattern: Pattern,
    *,
    derivative: str = "vjp",
    interpret: Any = False,
    function: str,
) -> Backend:
    """The backend that runs a call.

    Args:
      name: of the backend that the caller asks for, None for the best that can run on this platform.
      q_BLNK: queries, of which dtype and head dim count.
      pattern: who sees whom.
      derivative: "jvp" where the call has to pass ``jax.jvp``.
      interpret: whether kernels are emulated; only a named backend is.
      function: who asks, for the message.

    Raises:
      UserError: an unknown name, or a backend that cannot run here; the message says why and what can.
    """
    request = _request(q_BLNK, pattern, interpret, named=name is not None)

    def reason(backend: Backend) -> str | None:
        if derivative == "jvp" and not backend.forward_mode:
            return "it has gradients only, no forward mode"
        return backend.why_not(request)

    found = {backend.name: backend for backend in backends.BACKENDS}
    able = [backend for backend in found.values() if reason(backend) is None]
    if name is None:
        return able[0]
    if name not in found:
        raise UserError(
            f"{function}: unknown implementation {name!r}; choose from {', '.join(found)}, or None.",
            field="implementation",
        )
    if found[name] not in able:
        others = " or ".join(backend.name for backend in able)
        raise UserError(
            f"{function}: {name!r} cannot run here: {reason(found[name])}; use {others}, or None for the best.",
            field="implementation",
        )
    return found[name]


def _request(q_BLNK, pattern: Pattern, interpret: Any, *, named: bool) -> Request:
    platform, kind = device()
    platform = "gpu" if platform == "cuda" else platform
    interpret = bool(interpret) and named
    return Request(platform, kind, q_BLNK.shape[-1], q_BLNK.dtype, pattern, interpret, named)


def passed_over(q_BLNK: Any, pattern: Pattern) -> dict[str, str]:
    """{backend that would run if it were asked for by name: why another one is taken without}; as for ``choose``."""
    usual, named = (_request(q_BLNK, pattern, False, named=named) for named in (False, True))
    reasons = {b.name: b.why_not(usual) for b in backends.BACKENDS if b.why_not(named) is None}
    return {name: reason for name, reason in reasons.items() if reason is not None}
