"""Distil bidirectional video diffusion transformers into streaming students, in JAX and Flax.

The names in ``__all__`` are the public face (docs/api): ``from greedy_distill_jax import Run, Session``. Each is
imported when it is first used (PEP 562), so importing the package starts no backend and reads no file.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_ROOMS = {
    "CausalConfig": "models.students.config",
    "CausalStudent": "models.students.causal",
    "Pattern": "ops.attention",
    "Run": "runs.run",
    "Session": "streaming.session",
    "StepPlan": "diffusion.step_plan",
    "Student": "models.students.etm_sdd",
    "StudentConfig": "models.students.config",
    "Teacher": "models.wan.dit",
    "UserError": "errors",
    "WanConfig": "models.wan.config",
    "chunk_attention": "ops.attention",
    "make_streamer": "streaming.make",
}
__all__ = tuple(_ROOMS)


def __getattr__(name: str) -> Any:
    if name not in _ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(f"{__name__}.{_ROOMS[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_ROOMS})
