"""The quickstart: a laptop-sized teacher and the student distilled from it, the architecture of the large ones.

    python -m greedy_distill_jax.train --config=configs/quickstart.py:teacher --workdir=runs/teacher
    python -m greedy_distill_jax.train --config=configs/quickstart.py:student --workdir=runs/student \
        --config.teacher_from=runs/teacher

``launch/quickstart.sh`` runs both, streams a video and writes the report. ``teacher,fast`` is the same in under half
the time (its report says which gates it misses), ``teacher,smoke`` a few updates for CI.

The recipe: Muon for the kernels, x0 prediction and x0 weighting, small batches, noise shift 8 (positions are decided at
very high noise), teacher first, student cut from it.
"""

from greedy_distill_jax.config import base

STEPS = {"full": (3500, 600), "fast": (1200, 200), "smoke": (8, 4)}


def get_config(arg: str = "teacher"):
    """``arg``: "teacher" or "student", with ",fast" or ",smoke" for the short runs."""
    stage, _, speed = arg.partition(",")
    speed = speed or "full"
    if stage not in ("teacher", "student") or speed not in STEPS:
        raise ValueError(f"{arg!r} is not one of teacher, student, each with ',fast' or ',smoke' or neither")
    config = base()
    options = config.losses.flow_matching.options
    options.shift, options.weighting = 8.0, "x0"
    config.data.batch = 16
    if stage == "teacher":
        config.stage = "teacher"
        config.optimizer.muon_rate = 3e-2
    else:
        config.stage = "teacher_forcing"
        config.optimizer.muon_rate = 1e-2
        config.optimizer.learning_rate = 1e-3
        config.sample.guidance = 1.0
    config.steps = STEPS[speed][stage == "student"]
    config.log.samples_every = config.steps
    if speed == "smoke":
        config.data.batch = 4
        config.model.dim, config.model.ffn_dim, config.model.num_layers = 24, 48, 2
        config.sample.steps = 2
        config.log.every = 2
    return config
