"""The streaming functions of any student."""

from greedy_distill_jax.diffusion.step_plan import StepPlan
from greedy_distill_jax.models.students.base import StreamingModel
from greedy_distill_jax.models.students.etm_sdd import Student
from greedy_distill_jax.streaming.causal import CausalStreamer
from greedy_distill_jax.streaming.etm_sdd import Streamer


def make_streamer(student: StreamingModel, plan: StepPlan) -> Streamer | CausalStreamer:
    """The streaming functions of any student."""
    return Streamer(student, plan) if isinstance(student, Student) else CausalStreamer(student, plan)
