"""Chunk-sparse attention: query chunks attend to short lists of key chunks."""

from greedy_distill_jax.ops.attention.api import chunk_attention
from greedy_distill_jax.ops.attention.pattern import Pattern

__all__ = ["Pattern", "chunk_attention"]
