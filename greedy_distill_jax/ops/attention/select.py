"""Which implementation runs: the best one of the platform, or the named one if it can."""

import jax
import jax.numpy as jnp

from greedy_distill_jax.errors import UserError

NAMES = ("xla", "cudnn", "pallas_tpu", "reference")
# In this order of preference; "xla" runs everywhere.
BEST = {"tpu": ("pallas_tpu", "xla"), "gpu": ("cudnn", "xla"), "cpu": ("xla",)}
HEAD_DIMS_TPU = (64, 128)


def device() -> tuple[str, str]:
    """(platform, device kind) that the code being traced is for: the ambient abstract mesh's, else the default one."""
    ambient = jax.sharding.get_abstract_mesh().abstract_device
    if ambient is not None:
        return ambient.platform, ambient.device_kind
    return jax.default_backend(), jax.devices()[0].device_kind


def _no_pallas_tpu(platform: str, q, interpret) -> str | None:
    if platform != "tpu" and not interpret:
        return f"it needs a TPU and this is {platform} (interpret=True emulates it)"
    if q.shape[-1] not in HEAD_DIMS_TPU:
        return f"the head dim is {q.shape[-1]}, not one of {HEAD_DIMS_TPU}"
    if q.dtype not in (jnp.float32, jnp.bfloat16):
        return f"the dtype is {q.dtype}, not float32 or bfloat16"
    return None


def _no_cudnn(platform: str, q, visible_QS) -> str | None:
    if platform not in ("gpu", "cuda"):
        return f"it needs an NVIDIA GPU and this is {platform}"
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"the dtype is {q.dtype}, not bfloat16 or float16"
    if q.shape[-1] % 8 or q.shape[-1] > 128:
        return f"the head dim is {q.shape[-1]}, not a multiple of 8 up to 128"
    if visible_QS is not None:
        return "it cannot hide chunks at run time (visible_QS)"
    return None


def why_not(name: str, q, visible_QS=None, interpret=False) -> str | None:
    """Why the implementation cannot run on these inputs on this platform; None if it can."""
    platform = device()[0]
    if name == "pallas_tpu":
        return _no_pallas_tpu(platform, q, interpret)
    return _no_cudnn(platform, q, visible_QS) if name == "cudnn" else None


def choose(
    name: str | None, q, *, visible_QS=None, allowed: tuple[str, ...] = NAMES, interpret=False, function: str
) -> str:
    """Name of the implementation to run.

    Args:
      name: what the caller asked for, None for the best.
      q: queries (dtype and head dim count).
      visible_QS: the traced mask or None.
      allowed: the names that can do what is asked of ``function``.
      interpret: whether Pallas kernels are emulated.
      function: who asks, for the message.

    Raises:
      UserError: an unknown name, or one that cannot run here; the message says why and what can.
    """

    def reason(candidate):
        if candidate not in allowed:
            return "it does not have this form"
        return why_not(candidate, q, visible_QS, interpret)

    if name is None:
        platform = device()[0]
        return next(n for n in BEST.get("gpu" if platform == "cuda" else platform, ("xla",)) if reason(n) is None)
    if name not in NAMES:
        raise UserError(f"{function}: unknown implementation {name!r}; choose from {', '.join(NAMES)}, or None.")
    if reason(name):
        able = " or ".join(n for n in NAMES if reason(n) is None)
        raise UserError(f"{function}: {name!r} cannot run here: {reason(name)}; use {able}, or None for the best.")
    return name
