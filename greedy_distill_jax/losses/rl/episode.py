"""What losses of stage "rl" are given: a group's videos, how they came about, and how they were judged."""

from typing import NamedTuple

from jaxtyping import Array, Float, Float32


class Episode(NamedTuple):
    """The frames that B = prompts x group streams made by themselves; no gradient flows through any of it.

    The streams of a group lie side by side (0 .. group - 1 are those of the first prompt): they share a prompt and a
    past, and differ in their noise. Of every chunk one denoising step was recorded: it led from ``x`` at level
    ``sigma`` to ``next`` at level ``next_sigma``. With the sampler "renoise" that step is a draw from the Gaussian
    policy N((1 - next_sigma) x0(x, sigma), next_sigma^2); after the last step of a list ``next_sigma`` is 0 and
    ``next`` is the chunk.

    x0: the finished frames. predicted: x0(x, sigma) as the policy that made the episode had it. reward: combined, 0
    where it does not count. advantage: of each stream within its group, 0 where it does not count. counts: 1, or 0 for
    a stream that could not be judged or whose group was judged all alike. weight: of every frame, of mean 1.
    group: streams per prompt.
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
    weight_T: Float[Array, " T"]
    group: int
