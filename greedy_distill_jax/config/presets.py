"""Settings of the papers, as changes to a configuration."""

from ml_collections import ConfigDict


def greedy_distill_paper(config: ConfigDict) -> ConfigDict:
    """Makes a stage-2 config the published setting: a bidirectional teacher, the student itself as the fake score.

    There is no critic, so every step updates the student.
    """
    config.distill.real, config.distill.fake, config.distill.pg = "joint", "self_sg", "rollout_trunc"
    config.distill.generator_every, config.distill.critic_warmup = 1, 0
    return config
