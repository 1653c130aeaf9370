"""What losses of stage "rl" are given: a group's videos, how they came about, and how they were judged."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32


class Episode(NamedTuple):
    """The frames that B = prompts x group streams made by themselves; no gradient flows through any of it.

    The streams of a group lie side by side (0 .. group - 1 are those of the first prompt): they share a prompt and a
    past, and differ in their noise. Of every chunk one denoising step was recorded: it led from ``x`` at level
    ``sigma`` to ``next`` at level ``next_sigma``. With the sampler "renoise" that step is a draw from the Gaussian
    policy N((1 - next_sigma) x0(x, sigma), next_sigma^2); after the last step of a list ``next_sigma`` is 0 and
    ``next`` is the chunk.

    x0: the finished frames. predicted: x0(x, sigma) as the policy that made the episode had it. reward: combined, 0
    where it is not known. advantage: of each stream within its group, 0 where it does not count. counts: 1, or 0 for a
    stream that could not be judged or whose group was judged all alike. judged: 1, or 0 for a stream that could not be
    judged; all 1 where there is no reward. weight: of every frame, of mean 1. group: streams per prompt.

    Losses that compare the streams of a group go by ``counts``, the others by ``judged``: a group judged all alike says
    nothing of what is better, but its frames are as good as any.
    """

    x0_BTHWC: Float32[Array, "B T H W C"]
    x_BTHWC: Float32[Array, "B T H W C"]
    sigma_T: Float32[Array, " T"]
    next_BTHWC: Float32[Array, "B T H W C"]
    next_sigma_T: Float32[Array, " T"]
    predicted_BTHWC: Float32[Array, "B T H W C"]
    reward_B: Float[Array, " B"]
    advantage_B: Float[Array, " B"]
    counts_B: Float[Array, " B"]
    judged_B: Float[Array, " B"]
    weight_T: Float[Array, " T"]
    group: int

    def only(self, mask_B: Float[Array, " B"]) -> "Episode":
        """The same with zeros for what the other streams hold: what is computed from them has no NaN.

        A mask on the result alone is not enough, because 0 times the gradient of a NaN is a NaN. The inputs ``x`` are
        left, so that losses that ask the student at them share one pass; the stage gives no NaN in them.
        """

        def kept(x):
            return jnp.where(mask_B.reshape(-1, *(1,) * (x.ndim - 1)) > 0, x, 0.0)

        of_streams = [name for name in self._fields if name.endswith(("_BTHWC", "_B")) and name != "x_BTHWC"]
        return self._replace(**{name: kept(getattr(self, name)) for name in of_streams})
