"""The Wan2.1 1.3B teacher: flow matching (docs/method.md, section 2.7).

    python -m greedy_distill_jax.train --config=configs/wan1_3b/teacher.py --workdir=runs/wan1_3b \
        --config.data.source=latents:DIR --config.data.text=DIR/text

Not yet run at full size. Compiled for TPU v5e:4x4, four groups of four chips, it needs 8.2 of 15.75 GiB per chip. On
other slices, or where a chip holds a whole video (config.mesh.context=1), config.data.accumulate = 64 / groups; the
second command finds the smallest slice and says it:

    python -m greedy_distill_jax.compile train --config=configs/wan1_3b/teacher.py --topology=v5e:4x4
    python -m greedy_distill_jax.compile train --config=configs/wan1_3b/teacher.py --topology=v5e --search
"""

from greedy_distill_jax.config import base


def get_config():
    """bf16 matmuls, full rematerialisation, velocity prediction, AdamW."""
    config = base()
    config.model.size = "wan1_3b"
    config.steps = 4000
    config.data.frames = 21
    config.data.batch = 64  # = 16 microbatches x 1 video x 4 groups of 4 chips
    config.data.accumulate = 16
    config.mesh.data, config.mesh.fsdp, config.mesh.context = 1, -1, 4
    config.optimizer.name = "adamw"
    config.optimizer.learning_rate = 2e-6
    config.optimizer.betas = (0.9, 0.999)
    config.optimizer.weight_decay = 0.01
    config.optimizer.warmup = 0
    config.optimizer.final = 1.0
    config.ema.decay = 0.99
    config.ema.start = 200
    config.sample.steps = 50
    config.sample.sampler = "unipc"
    config.sample.guidance = 5.0
    config.losses.flow_matching.options.weighting = "bell"
    config.log.samples_every = 0  # one device would sample for many minutes, and all others would wait
    return config
