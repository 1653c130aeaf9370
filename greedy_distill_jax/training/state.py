"""What a training run carries from step to step."""

from typing import Any, NamedTuple

import jax


class TrainState(NamedTuple):
    """Parameters, their exponential moving average, optimiser state and the number of updates made.

    Randomness is a function of (seed, step) and the data position of the step, so neither is state.
    """

    step: jax.Array  # int32
    params: Any
    ema: Any
    opt_state: Any
    critic: Any = None  # stage 2 with a separate fake score
    critic_opt: Any = None
