"""The arguments of one attention call, as shapes: what is compiled, tuned and timed."""

import dataclasses

import jax
import jax.numpy as jnp

from greedy_distill_jax.ops.attention.pattern import Pattern


@dataclasses.dataclass(frozen=True)
class Spec:
    """One workload.

    Attributes:
      name: what it is called in tables.
      pattern: who sees whom.
      heads: attention heads.
      dim: head dim.
      dtype: of q, k and v.
      batch: examples.
    """

    name: str
    pattern: Pattern
    heads: int
    dim: int = 128
    dtype: str = "bfloat16"
    batch: int = 1

    @property
    def flops(self) -> int:
        """Floating-point operations of the two matmuls of a forward pass, on unmasked pairs only."""
        return 4 * self.batch * self.heads * self.dim * self.pattern.pairs

    def shapes(self, sharding=None) -> list[jax.ShapeDtypeStruct]:
        """q, k, v and the cotangent of the output."""
        q, k = self.pattern.q_tokens, self.pattern.k_tokens
        return [
            jax.ShapeDtypeStruct((self.batch, n, self.heads, self.dim), jnp.dtype(self.dtype), sharding=sharding)
            for n in (q, k, k, q)
        ]
