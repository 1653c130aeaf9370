"""What the attention op asks of a backend: one record, which holds everything that differs between backends."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from greedy_distill_jax.ops.attention.pattern import Pattern
from greedy_distill_jax.ops.attention.tuning import Blocks

# Operations of a backward pass over those of the forward pass's two matmuls. Flash attention computes its logits again,
# so that it takes five.
FLASH_BACKWARD = 2.5


class Request(NamedTuple):
    """What a backend is asked to run, as far as it can be a reason not to."""

    platform: str  # "cpu", "gpu", "tpu" or another one of jax's
    kind: str  # of the device, as jax names it
    head_dim: int
    dtype: Any
    pattern: Pattern
    interpret: bool  # kernels are emulated, on any platform
    named: bool  # asked for by name: not whether it is the best there


@dataclasses.dataclass(frozen=True)
class Call:
    """The static part of one call.

    Attributes:
      pattern: who sees whom.
      scale: softmax scale.
      blocks: block sizes, for a backend that has them.
      interpret: what its kernels are emulated with; False on a device.
    """

    pattern: Pattern
    scale: float
    blocks: Blocks | None = None
    interpret: Any = False


class Kernel(NamedTuple):
    """One device kernel of a backend, as the compile checks count its work."""

    matmuls: int  # of a visit of a block pair
    blocks: str  # field of ``Blocks`` with its block sizes
    by_key: bool = False  # it visits the list that is sorted by key


@dataclasses.dataclass(frozen=True)
class Backend:
    """One implementation of the attention op.

    Attributes:
      name: what callers give as ``implementation``.
      why_not: ``why_not(request)`` gives the reason why it cannot run that, or None if it can.
      attend: ``attend(q, k, v, lengths_Q, call)`` gives the output; ``lengths_Q``: see ``chunk_attention``, or None.
      forward: ``forward(q, k, v, lengths_Q, call)`` gives (output, residual), and
      backward: ``backward(residual, g, call)`` gives (dq, dk, dv): together its gradient. Without them jax
        differentiates ``attend``.
      forward_mode: whether ``jax.jvp`` goes through ``attend``.
      partitionable: whether the compiler can partition it over a mesh. What it cannot runs under ``shard_map``.
      backward_flops: operations of its backward pass over those of its forward pass.
      blocks: ``blocks(device kind, pattern, head dim, dtype)`` gives its block sizes; None without.
      kernels: its device kernels by name.
      estimates: ``estimates(pattern, queries, blocks)`` gives {kernel: what can be said of its speed without a device},
        to be printed. None without.
      stand_in: ``attend`` for a compiler that has no device to ask: calls with operands, results and workspace of the
        same shapes, which compute nothing. None where the real calls compile without a device.
    """

    name: str
    why_not: Callable[[Request], str | None]
    attend: Callable[..., Any]
    forward: Callable[..., Any] | None = None
    backward: Callable[..., Any] | None = None
    forward_mode: bool = False
    partitionable: bool = True
    backward_flops: float = FLASH_BACKWARD
    blocks: Callable[[str, Pattern, int, str], Blocks] | None = None
    kernels: Mapping[str, Kernel] = dataclasses.field(default_factory=dict, hash=False)
    estimates: Callable[..., Mapping[str, Any]] | None = None
    stand_in: Callable[..., Any] | None = None
