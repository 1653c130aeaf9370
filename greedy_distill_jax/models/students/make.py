"""The student that a config describes."""

from greedy_distill_jax.models.students.base import StreamingModel
from greedy_distill_jax.models.students.causal import CausalStudent
from greedy_distill_jax.models.students.config import CausalConfig, StudentConfig
from greedy_distill_jax.models.students.etm_sdd import Student


def make_student(cfg: StudentConfig | CausalConfig, derivative: str = "vjp") -> StreamingModel:
    """Makes the student that a config describes; ``derivative``: as for ``Teacher``."""
    return (Student if isinstance(cfg, StudentConfig) else CausalStudent)(cfg, derivative)
