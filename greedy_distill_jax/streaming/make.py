"""The streaming functions of any student."""

from greedy_distill_jax.models.students.base import StreamingModel
from greedy_distill_jax.models.students.etm_sdd import Student
from greedy_distill_jax.streaming.causal import CausalStreamer
from greedy_distill_jax.streaming.etm_sdd import Streamer
from greedy_distill_jax.streaming.loop import Sampling


def make_streamer(student: StreamingModel, sampling: Sampling) -> Streamer | CausalStreamer:
    """The streaming functions of any student."""
    return Streamer(student, sampling) if isinstance(student, Student) else CausalStreamer(student, sampling)
