"""Stage 2 at 1.3B: self-rollout with distribution matching (docs/method.md, section 7).

    python -m greedy_distill_jax.train --config=configs/wan1_3b/dmd.py --workdir=runs/stage2 \
        --config.teacher_from=runs/wan1_3b --config.student_from=runs/stage1 --config.data.source=latents:DIR \
        --config.data.text=DIR/text

The critic is a bidirectional 1.3B DiT that starts as the teacher; ``dmd.py:greedy_distill_paper`` is the published
setting, the student itself as the fake score. ``dmd.py:teacher_14b`` takes the real score from the 14B teacher, as
Self-Forcing and LongLive do; then --config.critic_from names the 1.3B one, and with a whole video
per chip the generator's step needs 26.2 of 95.73 GiB on TPU v5p:2x2x4. ``dmd.py:diagonal`` is Diagonal Distillation of
this student, ``dmd.py:diagonal_paper`` that of the paper, whose student is the causal one: its --config.student_from is
a run of ``causal.py``, its data are trajectories (see ``config.presets``).

Not yet run at full size; mesh and accumulate are for TPU v5e:4x4, as in ``teacher.py``. Chips of 32 GiB hold a whole
video each, which sends less and compiles faster. Both compile; the generator's step needs 13.5 of 15.75 GiB per chip on
v5e and 22.9 of 31.24 on v6e:

    python -m greedy_distill_jax.compile train --config=configs/wan1_3b/dmd.py --topology=v5e:4x4
    python -m greedy_distill_jax.compile train --config=configs/wan1_3b/dmd.py --topology=v6e:4x4 \
        --config.mesh.context=1 --config.data.accumulate=4
"""

from configs.wan1_3b import teacher_forcing
from greedy_distill_jax.config import presets
from greedy_distill_jax.text.prompts import WAN_NEGATIVE_PROMPT

PRESETS = {
    "greedy_distill_paper": presets.greedy_distill_paper,
    "diagonal": presets.diagonal,
    "diagonal_paper": presets.diagonal_paper,
}


def get_config(arg: str = "critic"):
    """Self-Forcing's settings, docs/method.md section 7.7. ``arg``: "critic", "teacher_14b" or one of ``PRESETS``."""
    if arg not in ("critic", "teacher_14b", *PRESETS):
        raise ValueError(f"{arg!r} is not one of critic, teacher_14b, {', '.join(PRESETS)}")
    config = teacher_forcing.get_config()
    config.stage = "dmd"
    config.steps = 600
    del config.losses["flow_matching"]
    config.losses.dmd = dict(loss="dmd", weight=1.0, options={})
    config.critic.losses.flow_matching.options.update(low=0.02, high=0.98)
    config.distill.guidance = 4.0
    config.distill.generator_every = 5
    config.text_dropout = 0.0
    config.data.negative_prompt = WAN_NEGATIVE_PROMPT
    for optimizer, rate in ((config.optimizer, 2e-6), (config.critic.optimizer, 4e-7)):
        optimizer.name, optimizer.learning_rate, optimizer.betas = "adamw", rate, (0.0, 0.999)
        optimizer.weight_decay, optimizer.clip, optimizer.warmup, optimizer.final = 0.01, 10.0, 0, 1.0
    config.optimizer.new_scale = 1.0
    config.ema.decay, config.ema.start = 0.99, 200
    config.sample.steps = 4
    config.sample.sampler = "renoise"
    if arg == "teacher_14b":
        config.distill.teacher_size = "wan14b"
    return PRESETS[arg](config) if arg in PRESETS else config
