"""Stage "teacher": the bidirectional DiT, by flow matching on data."""

import functools
from collections.abc import Mapping

from greedy_distill_jax.config.settings import Settings, terms_of
from greedy_distill_jax.diffusion.solvers import SOLVERS
from greedy_distill_jax.errors import UserError
from greedy_distill_jax.losses import Term
from greedy_distill_jax.ranges import Steps, complaint
from greedy_distill_jax.training import nets
from greedy_distill_jax.training.sources import Wanted
from greedy_distill_jax.training.stages.base import Inputs, Network, Part, Stage, StageKind, always, own_update
from greedy_distill_jax.training.update import data_step


class Teacher(StageKind):
    """See the module. Losses may ask for the "target", the average of the network itself."""

    trains = "teacher"
    offers = ("target",)

    def check(self, settings: Settings) -> None:
        """Raises UserError for a sampler that teachers do not have, and for what only students take."""
        if settings.sample.sampler not in SOLVERS:
            raise UserError(
                f"config.sample.sampler is {settings.sample.sampler!r}; a teacher's are {', '.join(SOLVERS)}."
            )
        wrong = complaint(settings.sample.steps, Steps)
        if wrong:
            raise UserError(f"config.sample.steps is {settings.sample.steps!r}; of a teacher it must be {wrong}.")
        if settings.sample.context_sigma:
            raise UserError(
                f"config.sample.context_sigma is {settings.sample.context_sigma}, but a teacher makes whole videos; "
                "leave it at 0."
            )

    def terms(self, settings: Settings) -> tuple[Term, ...]:
        """The losses, with one noise level per video."""
        return terms_of(settings.losses, "config.losses", settings, offered=self.offers, chunk_of=lambda loss: None)

    def wanted(self, settings: Settings) -> dict[str, Wanted]:
        """A teacher may go on from another run's, or from converted weights."""
        return {"teacher": Wanted("teacher_from", settings.wan)}

    def build(self, settings: Settings, inputs: Inputs) -> Stage:
        """The network and one part."""
        model, update = self.model(settings), own_update(settings, settings.steps)
        step = functools.partial(
            data_step,
            name="teacher",
            seed=settings.seed,
            null_MC=inputs.null_MC,
            make_net=functools.partial(nets.teacher_net, model),
            make_asked=lambda state, frozen: {"target": nets.teacher_net(model, state.nets["teacher"].ema)},
            prepare=lambda batch, key: batch,
            terms=settings.terms,
            update=update,
            text_dropout=settings.text_dropout,
            microbatches=settings.data.accumulate,
        )
        network = Network(model, update, start_from=("teacher",))
        return Stage({"teacher": network}, {}, (on_data("teacher", step),))


def on_data(name: str, step) -> Part:
    """The one part of a stage that trains on data: ``step(state, frozen, batch) -> (state, metrics)``."""

    def call(state, frozen: Mapping, batch, carry):
        return *step(state, frozen, batch), carry

    return Part(name, always, call)


STAGE = Teacher()
