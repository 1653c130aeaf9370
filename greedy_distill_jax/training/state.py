"""What a training run carries from step to step."""

from typing import Any, NamedTuple

import jax


class Net(NamedTuple):
    """A network that is trained.

    params: float32. ema: their exponential moving average, None where nothing is made from it. opt_state: of its
    optimiser.
    """

    params: Any
    ema: Any
    opt_state: Any


class TrainState(NamedTuple):
    """The networks of a run by name ("teacher" or "student", "critic", ...), and the number of steps made.

    Randomness is a function of (seed, step) and the data position of the step, so neither is state.
    """

    step: jax.Array  # int32
    nets: dict[str, Net]
