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


def astrolabe(config: ConfigDict) -> ConfigDict:
    """Makes a config of stage "rl" the setting of Astrolabe (arXiv 2603.17051).

    The contrast of better and worse clips, held near the student it started from; adapters of rank 256. There groups
    are of 24 streams, 48 prompts at a time.
    """
    _adapters(config, rate=1e-5, betas=(0.9, 0.999))
    config.losses.nft = dict(loss="nft", weight=1.0, options={"beta": 0.1})
    config.losses.kl = dict(loss="kl", weight=1e-4, options={})
    config.rl.old_decay = 0.9
    return config


def raven(config: ConfigDict) -> ConfigDict:
    """Makes a config of stage "rl" the setting of RAVEN (arXiv 2605.15190): re-noising steps as policies.

    One update per episode; of every chunk one step whose result is random. There groups are of 4 streams on each of 8
    devices, compared as one of 32.
    """
    _adapters(config, rate=5e-6, betas=(0.0, 0.999))
    config.losses.cm_grpo = dict(loss="cm_grpo", weight=100.0, options={})
    config.rl.step = "stochastic"
    config.steps, config.ema.decay, config.ema.start = 160, 0.9675, 0
    return config


def opsd_v(config: ConfigDict) -> ConfigDict:
    """Makes a config of stage "rl" the setting of OPSD-V (arXiv 2607.08766): the student with a better memory teaches.

    No groups and no reward, ``config.rl.rewards`` stays empty. It needs real videos as long as the streams, which begin
    with their first chunk.
    """
    _adapters(config, rate=1e-5, betas=(0.0, 0.999))
    config.losses.self_teacher = dict(loss="self_teacher", weight=1.0, options={})
    config.rl.group, config.rl.given, config.rl.keep = 1, config.student.chunk, 1
    config.steps, config.data.batch = 200, 64
    return config


def _adapters(config: ConfigDict, rate: float, betas: tuple[float, float]) -> None:
    config.optimizer.lora.rank = 256
    config.optimizer.learning_rate, config.optimizer.betas = rate, betas


def _diagonal_steps(config: ConfigDict) -> None:
    config.sample.steps, config.sample.sampler = "diagonal-4322222", "renoise"
    config.distill.exit, config.student.context = "random_but_first", "last_step_kv"
