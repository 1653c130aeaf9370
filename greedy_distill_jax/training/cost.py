"""What the parts of a step cost, in closed form (networks: ``models.flops``)."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from greedy_distill_jax.losses import Term, asked, dmd, motion, motion_head
from greedy_distill_jax.models import flops
from greedy_distill_jax.models.flops import Flops
from greedy_distill_jax.models.wan.config import WanConfig

OF_PAIR = (dmd, motion, motion_head)  # losses that look at the video and at the pair, and call no network themselves


class Cost(NamedTuple):
    """One update of the whole batch. ``executed`` counts what is computed again, too."""

    model: Flops
    executed: Flops


@dataclasses.dataclass(frozen=True)
class Meter:
    """Sizes that turn floating-point operations of one example into those of an update.

    batch: examples. frames: latent frames of one. tokens: of a latent frame. backward: attention's backward pass over
    its forward pass, see ``Backend.backward_flops``.
    """

    wan: WanConfig
    batch: int
    frames: int
    tokens: int
    backward: float

    def cost(self, trained: Flops, fixed: Flops = Flops(), repeated: int = 0) -> Cost:  # noqa: B008 (immutable)
        """Costs of what is differentiated (``repeated`` more forward passes of it), and of what only runs."""
        executed = trained.executed(self.wan.remat, self.backward) + trained * repeated + fixed
        return Cost((trained * flops.TRAINED + fixed) * self.batch, executed * self.batch)


def total(calls: Iterable[Flops]) -> Flops:
    """The sum of several calls."""
    return sum(calls, Flops())


def draws(terms: Sequence[Term]) -> list[int]:
    """Noise draws of every term that calls the network that is trained."""
    return [int(term.options.get("draws", 1)) for term in terms if term.loss not in OF_PAIR]


def score_calls(terms: Sequence[Term], score: str, draws: int) -> int:
    """How often a score is called: once per draw of the pair, and once by every term that asks for it by itself."""
    asks = [asked(term.loss) for term in terms]
    return draws * any("pair" in names for names in asks) + sum(score in names for names in asks)
