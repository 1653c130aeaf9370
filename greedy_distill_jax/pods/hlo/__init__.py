"""What a compiled program does beyond computing: its collectives and kernel calls, with how often they run."""

from greedy_distill_jax.pods.hlo.collectives import KINDS, Count, group_size
from greedy_distill_jax.pods.hlo.program import counts

__all__ = ["KINDS", "Count", "counts", "group_size"]
