"""Stage "ode": the student regresses the ends of a teacher's stored trajectories from the states on the way there.

It stands between stage 1 and stage 2, or in the place of stage 1: `prepare ode` stores the trajectories, whose noise
levels must be those of the student's step plan; ``config.data.source`` is "ode:DIR".
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from greedy_distill_jax.config.settings import Settings
from greedy_distill_jax.errors import UserError
from greedy_distill_jax.losses import asked
from greedy_distill_jax.training.stages.base import Inputs, Stage
from greedy_distill_jax.training.stages.teacher_forcing import TeacherForcing


class Ode(TeacherForcing):
    """See the module; the student is teacher-forced on the trajectories' ends.

    Losses may ask for "samples", the batch with its history, beside what stage 1 offers.
    """

    offers = (*TeacherForcing.offers, "samples")

    def check(self, settings: Settings) -> None:
        """Raises UserError for losses that use no trajectory."""
        super().check(settings)
        if not any("samples" in asked(term.loss) for term in settings.terms):
            raise UserError("config.losses has no loss 'ode'; stage ode needs one, or is stage teacher_forcing.")

    def check_source(self, settings: Settings, source: Any) -> None:
        """The data holds trajectories at the levels that the student is asked at."""
        check_trajectories(settings, source)

    def batch_shapes(self, settings: Settings, latent_shape, source: Any = None) -> dict[str, jax.ShapeDtypeStruct]:
        """The states beside the latents and the text."""
        return super().batch_shapes(settings, latent_shape) | states_shape(settings, latent_shape, source)

    def build(self, settings: Settings, inputs: Inputs) -> Stage:
        """As stage 1, the levels of the states in every batch."""
        stage = super().build(settings, inputs)
        (part,) = stage.parts
        return stage._replace(parts=(part._replace(call=with_levels(part.call, settings, inputs.source)),))


def check_trajectories(settings: Settings, source: Any) -> None:
    """Raises UserError for data that holds no trajectories, or not at every level that the student is asked at."""
    levels = getattr(source, "levels", None)
    if levels is None:
        raise UserError(
            f"config.data.source is {settings.data.source!r}, which holds no trajectories; make some with "
            f"python -m greedy_distill_jax.prepare ode, and name them as ode:DIR."
        )
    missing = sorted(set(_levels_of(settings)) - set(levels), reverse=True)
    if missing:
        raise UserError(
            f"config.data.source {settings.data.source!r} has states at the noise levels {_listed(levels)}, but "
            f"config.sample asks the student at {_listed(missing)} too; store trajectories for this configuration."
        )


def states_shape(settings: Settings, latent_shape, source: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """A batch of the states [B, K, T, H, W, C] of a source; None: of one for this configuration."""
    shape = (settings.data.batch, len(_levels_of(settings, source)), *latent_shape)
    return {"states": jax.ShapeDtypeStruct(shape, jnp.float32)}


def with_levels(call: Callable, settings: Settings, source: Any) -> Callable:
    """The call of a part, with the levels of the states in its batch: "levels" [B, K]."""
    levels = jnp.asarray(_levels_of(settings, source), jnp.float32)

    def told(state, frozen, batch, carry):
        return call(state, frozen, batch | {"levels": jnp.tile(levels[None], (len(batch["text"]), 1))}, carry)

    return told


def _levels_of(settings: Settings, source: Any = None) -> tuple[float, ...]:
    """Noise levels of the source's states, else those that the student is asked at, decreasing."""
    own = {sigma for row in settings.plan.sigmas for sigma in row}
    return tuple(sorted(own, reverse=True)) if source is None else tuple(source.levels)


def _listed(levels) -> str:
    return ", ".join(f"{level:.4g}" for level in levels)


STAGE = Ode()
