"""Stage "teacher_forcing" (stage 1 of the student): flow matching on data, every chunk given the clean ones before."""

import functools

from greedy_distill_jax.config.settings import Settings
from greedy_distill_jax.models.students.base import StreamingModel
from greedy_distill_jax.training import nets
from greedy_distill_jax.training.sources import Wanted
from greedy_distill_jax.training.stages.base import Inputs, Network, Stage, StageKind, own_update
from greedy_distill_jax.training.stages.teacher import on_data
from greedy_distill_jax.training.update import data_step


class TeacherForcing(StageKind):
    """See the module."""

    def wanted(self, settings: Settings) -> dict[str, Wanted]:
        """The teacher that the student is cut from, or a student that is trained further."""
        return {
            "student": Wanted("student_from", settings.student_config),
            "teacher": Wanted("teacher_from", settings.wan),
        }

    def build(self, settings: Settings, inputs: Inputs) -> Stage:
        """The network and one part."""
        model, update = self.model(settings), own_update(settings, settings.steps)
        step = functools.partial(
            data_step,
            name="student",
            seed=settings.seed,
            null_MC=inputs.null_MC,
            make_net=student_net(settings, model),
            terms=settings.terms,
            update=update,
            text_dropout=settings.text_dropout,
            microbatches=settings.data.accumulate,
        )
        network = Network(model, update, start_from=("student", "teacher"))
        return Stage({"student": network}, {}, (on_data("teacher_forcing", step),))


def student_net(settings: Settings, student: StreamingModel):
    """``make_net(params, key)`` of the teacher-forced student, its history as the settings have it."""
    lists = settings.sampling.sigmas
    last = (lists[0][-1], lists[-1][-1]) if student.cfg.context == "last_step_kv" else None
    return functools.partial(
        nets.student_net, student, context_noise=settings.student.context_noise, last_sigmas=last
    )  # fmt: skip


STAGE = TeacherForcing()
