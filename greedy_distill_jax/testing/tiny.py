"""Tiny configurations and parameters that are nowhere zero."""

import dataclasses

import jax
import jax.numpy as jnp

from greedy_distill_jax.models.wan_config import WAN_SIZES, StudentConfig, WanConfig

BASE = WanConfig(
    **{**WAN_SIZES["tiny"], "dim": 24, "ffn_dim": 32, "num_heads": 2, "num_layers": 3, "freq_dim": 8, "channels": 4,
       "text_dim": 6, "text_len": 3}
)  # fmt: skip
STUDENT = StudentConfig(base=BASE, etm_layers=(0, 1), sdd_layers=(0, 1, 2), window=3, rope_frames=6)


def student_config(**changes) -> StudentConfig:
    """``STUDENT`` with some fields changed."""
    return dataclasses.replace(STUDENT, **changes)


def perturbed(params, key, scale: float = 0.3):
    """Adds noise to every leaf: zero-initialised heads and gates would hide errors behind them."""
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(key, len(leaves))
    noisy = [
        x + scale * jax.random.normal(k, x.shape, x.dtype) / (x.shape[-2] ** 0.5 if x.ndim > 1 else 1.0)
        for x, k in zip(leaves, keys, strict=True)
    ]
    return jax.tree.unflatten(tree, noisy)


def text_rows(batch: int, key, base: WanConfig = BASE):
    """Random encoder rows."""
    return jax.random.normal(key, (batch, base.text_len, base.text_dim), jnp.float32)
