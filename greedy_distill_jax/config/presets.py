"""Settings of the papers, as changes to a configuration."""

from ml_collections import ConfigDict

from greedy_distill_jax.config.keys import Causal, Student
from greedy_distill_jax.config.tree import config_of


def greedy_distill_paper(config: ConfigDict) -> ConfigDict:
    """Makes a stage-2 config the published setting: a bidirectional teacher, the student itself as the fake score.

    There is no critic, so every step updates the student.
    """
    config.distill.real, config.distill.fake, config.distill.pg = "joint", "self_sg", "rollout_trunc"
    config.distill.generator_every, config.distill.critic_warmup = 1, 0
    return config


def diagonal(config: ConfigDict) -> ConfigDict:
    """Makes a stage-2 config of ETM + SDD one of Diagonal Distillation (arXiv 2603.09488).

    Steps 4, 3, 2, 2, ..., no pass for contexts, and the motion of latents matched beside them, gamma = 1: what measured
    best for its cost (docs/results.md).
    """
    _diagonal_steps(config)
    config.losses.motion = dict(loss="motion", weight=1.0, options={})
    return config


def diagonal_paper(config: ConfigDict) -> ConfigDict:
    """Makes a stage-2 config of a causal student that of Diagonal Distillation's paper (arXiv 2603.09488).

    Chunks of 3 frames that see 12: 3 of the sink, 6 of history, 3 of their own. The total is 4 DMD + regression +
    gamma (4 DMD of motion + regression of motion), gamma = 1; motion is matched in a learned feature. The regression
    needs the teacher's trajectories at the plan's levels (`prepare ode`) as ``config.data.source`` "ode:DIR"; without
    them, delete ``config.losses.regression``.
    """
    _diagonal_steps(config)
    causal = Causal(window=12, sink=3)
    config.student.update(config_of(Student(kind="causal", chunk=3, context=config.student.context, causal=causal)))
    config.losses.dmd.weight = 4.0
    config.losses.motion = dict(loss="motion_head", weight=4.0, options={})
    config.losses.regression = dict(loss="ode", weight=1.0, options={"motion": 1.0})
    return config


def _diagonal_steps(config: ConfigDict) -> None:
    config.sample.steps, config.sample.sampler = "diagonal-4322222", "renoise"
    config.distill.exit, config.student.context = "random_but_first", "last_step_kv"
