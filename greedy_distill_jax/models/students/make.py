"""The student that a config describes."""

from greedy_distill_jax.models.students.base import StreamingModel
from greedy_distill_jax.models.students.causal import CausalStudent
from greedy_distill_jax.models.students.config import CausalConfig, StudentConfig
from greedy_distill_jax.models.students.etm_sdd import Student


def make_student(cfg: StudentConfig | CausalConfig) -> StreamingModel:
    """The student a config describes."""
    return Student(cfg) if isinstance(cfg, StudentConfig) else CausalStudent(cfg)
