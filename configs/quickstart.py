"""The quickstart: a laptop-sized teacher and the student distilled from it, the architecture of the large ones.

    python -m greedy_distill_jax.train --config=configs/quickstart.py:teacher --workdir=runs/teacher
    python -m greedy_distill_jax.train --config=configs/quickstart.py:student --workdir=runs/student \
        --config.teacher_from=runs/teacher

``launch/quickstart.sh`` runs both, streams a video and writes the report. ``teacher,fast`` and ``student,fast`` are
the same in a third of the time; their report says which gates they miss. Recipe: Muon for the kernels, x0 prediction,
noise shift 8 (positions are decided at very high noise), teacher first, student cut from it.
"""

from greedy_distill_jax.config import base


def get_config(arg: str = "teacher"):
    """``arg``: "teacher" or "student", with ",fast" for the short run."""
    stage, _, speed = arg.partition(",")
    if stage not in ("teacher", "student") or speed not in ("", "fast"):
        raise ValueError(f"configs/quickstart.py:{arg}: choose teacher, student, 'teacher,fast' or 'student,fast'.")
    fast = speed == "fast"
    config = base()
    options = config.losses.flow_matching.options
    with config.unlocked():
        options.shift = 8.0
    if stage == "teacher":
        config.stage = "teacher"
        config.steps = 800 if fast else 3000
    else:
        config.stage = "teacher_forcing"
        config.steps = 150 if fast else 500
        config.data.batch = 16
        config.optimizer.muon_rate = 1e-2
        config.optimizer.learning_rate = 1e-3
        config.sample.guidance = 1.0
        with config.unlocked():
            options.per_frame = True
    config.log.samples_every = config.steps
    return config
