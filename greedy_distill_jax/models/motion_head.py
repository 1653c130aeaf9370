"""A small convolutional network on the motion of latents: what the loss ``motion_head`` compares motions in."""

import dataclasses
import math
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray


@dataclasses.dataclass(frozen=True)
class MotionHeadConfig:
    """Sizes: channels of the latents, width and number of the hidden layers."""

    channels: int
    width: int = 64
    layers: int = 2


class _Hidden(nn.Module):
    """Conv 3x3, GroupNorm of 32 groups (fewer where the width does not divide into them), SiLU."""

    width: int

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(self.width, (3, 3), name="conv")(x)
        return nn.silu(nn.GroupNorm(math.gcd(32, self.width), name="norm")(x))


class _Net(nn.Module):
    """One frame at a time, [N, H, W, C] to the same."""

    cfg: MotionHeadConfig

    @nn.compact
    def __call__(self, y):
        x = nn.silu(y)
        for i in range(self.cfg.layers):
            x = _Hidden(self.cfg.width, name=f"hidden_{i}")(x)
        return y + nn.Conv(self.cfg.channels, (1, 1), kernel_init=nn.initializers.zeros, name="mix")(x)


class MotionHead:
    """y + Conv 1x1 (hidden layers of SiLU(y)), for every difference of frames by itself; float32.

    The last layer starts at zero, so that the head starts as the identity. The layers are those of Diagonal
    Distillation's first code, which applies them to the frames.
    """

    def __init__(self, cfg: MotionHeadConfig):
        self.cfg = cfg

    def init(self, key: PRNGKeyArray, latent_shape: tuple[int, int, int, int]) -> Any:
        """Parameters for latents [T, H, W, C]; the tree does not depend on T, H, W."""
        return _Net(self.cfg).init(key, jnp.zeros((1, *latent_shape[1:]), jnp.float32))["params"]

    def __call__(self, params: Any, y_BFHWC: Float[Array, "B F H W C"]) -> Float[Array, "B F H W C"]:
        """The feature of the differences of frames."""
        each = y_BFHWC.reshape(-1, *y_BFHWC.shape[2:])
        return _Net(self.cfg).apply({"params": params}, each).reshape(y_BFHWC.shape)
