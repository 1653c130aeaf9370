"""Stage "teacher_forcing" (stage 1 of the student): flow matching on data, every chunk given the clean ones before."""

import functools

from greedy_distill_jax.config.settings import Settings
from greedy_distill_jax.losses import asked
from greedy_distill_jax.models.students.base import StreamingModel
from greedy_distill_jax.models.wan.dit import Teacher
from greedy_distill_jax.models.wan.linear import compute_precision
from greedy_distill_jax.training import nets
from greedy_distill_jax.training.sources import Wanted
from greedy_distill_jax.training.stages.base import Inputs, Network, Stage, StageKind, own_update
from greedy_distill_jax.training.stages.teacher import on_data
from greedy_distill_jax.training.update import data_step


class TeacherForcing(StageKind):
    """See the module.

    Losses may ask for the "target", the average of the student itself, and for "real", the frozen teacher of
    ``config.teacher_from``.
    """

    offers = ("target", "real")

    def wanted(self, settings: Settings) -> dict[str, Wanted]:
        """The teacher that the student is cut from, or a student that is trained further."""
        asks_real = any("real" in asked(term.loss) for term in settings.terms)
        teacher = Wanted(
            "teacher_from", settings.wan, frozen="teacher" if asks_real else "", why="a loss that asks for 'real'"
        )
        return {"student": Wanted("student_from", settings.student_config), "teacher": teacher}

    def build(self, settings: Settings, inputs: Inputs) -> Stage:
        """The network and one part."""
        model, update = self.model(settings), own_update(settings, settings.steps)
        teacher = Teacher(settings.wan)

        def make_asked(state, frozen):
            target = {"target": nets.student_net(model, state.nets["student"].ema)}
            return target | ({"real": nets.teacher_net(teacher, frozen["teacher"])} if frozen else {})

        step = functools.partial(
            data_step,
            name="student",
            seed=settings.seed,
            null_MC=inputs.null_MC,
            make_net=functools.partial(nets.student_net, model),
            make_asked=make_asked,
            prepare=looking_back(settings, model),
            terms=settings.terms,
            update=update,
            text_dropout=settings.text_dropout,
            microbatches=settings.data.accumulate,
        )
        network = Network(model, update, start_from=("student", "teacher"))
        frozen = {name: compute_precision(tree, settings.wan.dtype) for name, tree in inputs.frozen.items()}
        return Stage({"student": network}, frozen, (on_data(settings.stage, step),))


def looking_back(settings: Settings, student: StreamingModel):
    """``prepare(batch, key)``: the batch with its history, as the settings have it (``nets.look_back``)."""
    noise = settings.student.context_noise
    return functools.partial(nets.look_back, student, plan=settings.plan, context_noise=noise)


STAGE = TeacherForcing()
