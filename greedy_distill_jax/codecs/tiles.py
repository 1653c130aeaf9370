"""Frames too large for a device, in tiles that overlap and are blended."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32

from greedy_distill_jax.codecs.vae import Cache

Step = Callable[[Cache, jax.Array], tuple[Cache, jax.Array]]  # (cache, [B, T, ...]) -> (cache, [B, T', ...])


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Tiles of one size, in latent pixels, that overlap and are blended linearly.

    A tile at a time is on the device with its activations; what its convolutions remember stays there for all tiles.
    The result is close to that of the whole frame and not the same: what a tile does not see is zero for it, and the
    attention of Wan's autoencoder looks at one tile.

    Attributes:
      size: (height, width) of a tile; a frame that is not larger is not divided.
      overlap: of neighbours, at least.
    """

    size: tuple[int, int] = (32, 32)
    overlap: int = 8

    def __post_init__(self):
        if not 0 < self.overlap < min(self.size):
            raise ValueError(f"tiles of {self.size} cannot overlap by {self.overlap}; use 1 to {min(self.size) - 1}.")

    def starts(self, extent: int, axis: int) -> tuple[int, ...]:
        """Where tiles begin along an axis of ``extent`` latent pixels: evenly, from one end to the other."""
        size = self.size[axis]
        if extent <= size:
            return (0,)
        count = -(-(extent - self.overlap) // (size - self.overlap))
        return tuple(round(i * (extent - size) / (count - 1)) for i in range(count))

    def weights(self, extent: int, axis: int, scale: int) -> Float32[np.ndarray, "n pixels"]:
        """[tiles, pixels of a tile], summing to one at every pixel; ``scale`` pixels per latent pixel."""
        starts, size = self.starts(extent, axis), min(self.size[axis], extent) * scale
        total, ramps = np.zeros(extent * scale), []
        for i, start in enumerate(starts):
            position, ramp = np.arange(size) + 0.5, np.ones(size)
            if i > 0:
                ramp = np.minimum(ramp, position / (scale * (starts[i - 1] + self.size[axis] - start)))
            if i + 1 < len(starts):
                ramp = np.minimum(ramp, (size - position) / (scale * (start + self.size[axis] - starts[i + 1])))
            total[start * scale : start * scale + size] += ramp
            ramps.append(ramp)
        return np.stack([r / total[s * scale : s * scale + size] for r, s in zip(ramps, starts)]).astype(np.float32)


def tiled(step: Step, tiles: Tiles, scale_in: int, scale_out: int) -> Step:
    """``step`` on every tile in turn, with a cache that has a leading axis of tiles.

    Args:
      step: of a stream, for any height and width.
      tiles: sizes.
      scale_in, scale_out: pixels per latent pixel of what ``step`` takes and gives.
    """

    def run(cache, x):
        extents = [n // scale_in for n in x.shape[2:4]]
        rows, columns = (tiles.starts(n, axis) for axis, n in enumerate(extents))
        corners = [(row, column) for row in rows for column in columns]
        size = [min(s, n) for s, n in zip(tiles.size, extents)]

        def cut(array, row, column, scale):
            return array[:, :, row * scale : (row + size[0]) * scale, column * scale : (column + size[1]) * scale]

        pieces = jnp.stack([cut(x, *corner, scale_in) for corner in corners])
        cache, pieces = jax.lax.map(lambda given: step(*given), (cache, pieces))
        down, across = (jnp.asarray(tiles.weights(n, axis, scale_out)) for axis, n in enumerate(extents))
        out = jnp.zeros((*pieces.shape[1:3], *(n * scale_out for n in extents), pieces.shape[-1]), pieces.dtype)
        for i, (row, column) in enumerate(corners):
            weight = down[i // len(columns)][:, None] * across[i % len(columns)][None]
            top, left = row * scale_out, column * scale_out
            place = out.at[:, :, top : top + weight.shape[0], left : left + weight.shape[1]]
            out = place.add(pieces[i] * weight[None, None, :, :, None])
        return cache, out

    return run
