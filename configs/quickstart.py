"""The quickstart: a laptop-sized teacher and the student distilled from it, the architecture of the large ones.

    python -m greedy_distill_jax.train --config=configs/quickstart.py:teacher --workdir=runs/teacher
    python -m greedy_distill_jax.train --config=configs/quickstart.py:student --workdir=runs/student \
        --config.teacher_from=runs/teacher
    python -m greedy_distill_jax.train --config=configs/quickstart.py:stage2 --workdir=runs/stage2 \
        --config.teacher_from=runs/teacher --config.student_from=runs/student
    python -m greedy_distill_jax.train --config=configs/quickstart.py:stage3 --workdir=runs/stage3 \
        --config.student_from=runs/stage2

``launch/quickstart.sh`` runs them, streams a video and writes the report. ``teacher,fast`` is a third of the updates
(its report says which gates it misses), ``teacher,smoke`` a few of them for CI. ``greedy_distill_paper`` in place of
``stage2`` is stage 2 as published: the student itself, as it is, as the fake score.

The recipe: Muon for the kernels, x0 prediction and x0 weighting, small batches, noise shift 8 (positions are decided at
very high noise), teacher first, student cut from it, stage 2 with few steps, stage 3 from a reward of its own streams.
"""

from greedy_distill_jax.config import base
from greedy_distill_jax.config.presets import greedy_distill_paper

STEPS = {
    "full": dict(teacher=3500, student=600, stage2=240, stage3=120),
    "fast": dict(teacher=1200, student=200, stage2=80, stage3=40),
    "smoke": dict(teacher=8, student=4, stage2=4, stage3=4),
}
STAGES = ("teacher", "student", "stage2", "stage3", "greedy_distill_paper")


def get_config(arg: str = "teacher"):
    """``arg``: one of STAGES, with ",fast" or ",smoke" for the short runs."""
    stage, _, speed = arg.partition(",")
    speed = speed or "full"
    if stage not in STAGES or speed not in STEPS:
        raise ValueError(f"{arg!r} is not one of {', '.join(STAGES)}, each with ',fast' or ',smoke' or neither")
    config = base()
    config.data.batch = 16
    config.shift = 8.0
    if speed == "smoke":
        config.sample.steps = 2
    config.losses.flow_matching.options.update(weighting="x0")
    if stage == "teacher":
        config.stage = "teacher"
        config.optimizer.muon_rate = 3e-2
    elif stage == "student":
        config.stage = "teacher_forcing"
        config.optimizer.muon_rate = 1e-2
        config.optimizer.learning_rate = 1e-3
        config.sample.guidance = 1.0
    else:
        _few_steps(config)
        if stage == "stage3":
            _stage3(config)
        else:
            _stage2(config)
    config.steps = STEPS[speed].get(stage, STEPS[speed]["stage2"])
    if stage == "greedy_distill_paper":
        greedy_distill_paper(config)
    if speed == "fast" and stage != "teacher":
        config.ema.decay = 0.99 if stage == "student" else 0.96  # of 100 and of 20 to 30 updates
    config.log.samples_every = 0  # the report shows every model; sampling would be one more program to compile
    if speed == "smoke":
        config.data.batch = 4
        config.model.dim, config.model.ffn_dim, config.model.num_layers = 24, 48, 2
        config.log.every = 2
        if stage in ("stage2", "greedy_distill_paper"):
            config.distill.critic_warmup = min(config.distill.critic_warmup, 1)
    return config


def _few_steps(config):
    """Two evaluations per frame, four for the first, and small updates of a trained student."""
    del config.losses["flow_matching"]
    config.optimizer.name, config.optimizer.learning_rate = "adamw", 2e-4
    _steady(config.optimizer)
    config.text_dropout = 0.0
    config.ema.decay, config.ema.start = 0.98, 20
    config.sample.steps = (4, 2)
    config.sample.sampler, config.sample.guidance = "renoise", 1.0


def _steady(optimizer):
    optimizer.betas, optimizer.final, optimizer.clip = (0.0, 0.99), 1.0, 10.0
    optimizer.warmup = 5


def _stage2(config):
    """A separate critic, and a student that learns fast first and settles at the end."""
    config.stage = "dmd"
    config.optimizer.learning_rate, config.optimizer.final = 4e-4, 0.1
    config.losses.dmd = dict(loss="dmd", weight=1.0, options={})
    config.critic.losses.flow_matching.options.update(low=0.02, high=0.98, weighting="x0")
    config.critic.optimizer.name, config.critic.optimizer.learning_rate = "adamw", 1e-3
    _steady(config.critic.optimizer)
    config.distill.generator_every = 1
    config.distill.critic_warmup = 20
    config.distill.guidance = 1.0  # match the data: guidance narrows the distribution


def _stage3(config):
    """Streams of up to 8 times the training length, whose last 8 frames are to move as the first ones did.

    Long streams slow down, and no score can tell: captions say how a video begins, so only its first window has one.
    """
    config.stage = "rl"
    config.data.batch = 4
    config.losses.direct = dict(loss="direct", weight=2.0, options={})
    config.losses.kl = dict(loss="kl", weight=15.0, options={})
    config.rl.rewards.motion = dict(reward="motion_band", weight=1.0)
    config.rl.rewards.colour = dict(reward="colour_kept", weight=1.0, judge=True)
    config.rl.frames, config.rl.clip, config.rl.step = 64, 8, "last"
    config.optimizer.learning_rate = 1e-4
