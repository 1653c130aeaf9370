"""Tiny configurations and parameters that are nowhere zero."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from greedy_distill_jax.models.wan_config import WAN_SIZES, StudentConfig, WanConfig

BASE = WanConfig(
    **{**WAN_SIZES["tiny"], "dim": 24, "ffn_dim": 32, "num_heads": 2, "num_layers": 3, "freq_dim": 8, "channels": 4,
       "text_dim": 6, "text_len": 3}
)  # fmt: skip
STUDENT = StudentConfig(base=BASE, etm_layers=(0, 1), sdd_layers=(0, 1, 2), window=3, rope_frames=6)


def student_config(**changes) -> StudentConfig:
    """``STUDENT`` with some fields changed."""
    return dataclasses.replace(STUDENT, **changes)


def random_params(model, seed: int = 0, latent_shape: tuple[int, int, int, int] = (1, 4, 4, 4)):
    """Parameters of a model's tree with no leaf zero or one: zero-initialised heads and gates would hide errors.

    Drawn with numpy from the shapes alone, because compiling an ``init`` takes longer than most tests.
    """
    shapes = jax.eval_shape(lambda key: model.init(key, latent_shape), jax.random.key(0))
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        value = rng.standard_normal(leaf.shape)
        if path[-1].key == "kernel":
            return jnp.asarray(value / np.sqrt(leaf.shape[-2]), leaf.dtype)
        return jnp.asarray((path[-1].key == "scale") + 0.3 * value, leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def text_rows(batch: int, key, base: WanConfig = BASE):
    """Random encoder rows."""
    return jax.random.normal(key, (batch, base.text_len, base.text_dim), jnp.float32)
