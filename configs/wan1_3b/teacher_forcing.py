"""Stage 1 at 1.3B: ETM + SDD by teacher forcing (docs/method.md, section 6).

    python -m greedy_distill_jax.train --config=configs/wan1_3b/teacher_forcing.py --workdir=runs/stage1 \
        --config.teacher_from=runs/wan1_3b --config.data.source=latents:DIR --config.data.text=DIR/text

Not yet run at full size; mesh and accumulate are for TPU v5e:4x4, as in ``teacher.py``. Compiled it needs 12.3 of 15.75
GiB per chip there, and 22.2 of 31.24 on v6e:4x4 with a whole video per chip:

    python -m greedy_distill_jax.compile train --config=configs/wan1_3b/teacher_forcing.py --topology=v5e:4x4
    python -m greedy_distill_jax.compile train --config=configs/wan1_3b/teacher_forcing.py --topology=v6e:4x4 \
        --config.mesh.context=1 --config.data.accumulate=4
"""

from configs.wan1_3b import teacher


def get_config():
    """Depth-halved interleaved copies, window 7, one noise level per frame."""
    config = teacher.get_config()
    config.stage = "teacher_forcing"
    config.steps = 10_000
    config.student.split = "interleaved"
    config.student.window = 7
    config.optimizer.learning_rate = 5e-6
    config.optimizer.new_scale = 10.0
    config.optimizer.betas = (0.9, 0.95)
    config.ema.decay = 0.999
    config.sample.sampler = "euler"
    config.sample.guidance = 1.0
    return config
