"""Stage 3 at 1.3B: a stage-2 student learns from rewards of its own long videos (docs/method.md, section 10).

    python -m greedy_distill_jax.train --config=configs/wan1_3b/rl.py --workdir=runs/stage3 \
        --config.student_from=runs/stage2 --config.data.source=prompts:captions.csv --config.data.text=DIR/text

Groups of 8 streams of up to 84 latent frames, 4 times the training length, part for the last 21 and learn from those
by ``nft`` (Astrolabe). ``rl.py:cm_grpo`` is RAVEN's loss, ``rl.py:self_teacher`` OPSD-V, which asks no reward and needs
latents of videos of 84 latent frames.

The rewards are formulas of pixels, so that the job needs nothing beside it. A reward model such as VideoAlign runs
behind a server (docs/guides/add_a_reward.md):

    --config.rl.rewards.videoalign.reward=http --config.rl.rewards.videoalign.weight=1.0 \
    --config.rl.rewards.videoalign.options.url=http://127.0.0.1:8100 \
    --config.rl.rewards.videoalign.options.scores=VQ,MQ,TA --config.rl.staleness=1

Not yet run; mesh and accumulate are for 16 chips of 95 GiB (TPU v5p:2x2x4). Compiled, without what rewards cost, the
update needs 88.7 of 95.73 GiB per chip and the rollout 11.3; both send more than the links can keep up with:

    python -m greedy_distill_jax.compile train --config=configs/wan1_3b/rl.py --topology=v5p:2x2x4
"""

from configs.wan1_3b import teacher_forcing
from greedy_distill_jax.config import presets

PRESETS = {"nft": presets.astrolabe, "cm_grpo": presets.raven, "self_teacher": presets.opsd_v}


def get_config(arg: str = "nft"):
    """``arg``: one of ``PRESETS``."""
    if arg not in PRESETS:
        raise ValueError(f"{arg!r} is not one of {', '.join(PRESETS)}")
    config = teacher_forcing.get_config()
    config.stage = "rl"
    config.steps = 400
    del config.losses["flow_matching"]
    config.text_dropout = 0.0
    config.data.batch = 16  # prompts, each with a group
    config.optimizer.new_scale = 1.0
    config.ema.decay, config.ema.start = 0.99, 100
    config.sample.steps = 4
    config.sample.sampler = "renoise"
    config.rl.group, config.rl.frames, config.rl.clip = 8, 84, 21
    if arg != "self_teacher":
        for name in ("anti_drift", "motion_band", "sharp_hold"):
            config.rl.rewards[name] = dict(reward=name, weight=1.0)
    config = PRESETS[arg](config)
    config.data.accumulate = config.data.batch // 4  # 4 groups of 4 chips
    return config
