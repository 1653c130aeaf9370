"""Stage 1 at 14B: ETM + SDD by teacher forcing (docs/method.md, section 6).

    python -m greedy_distill_jax.train --config=configs/wan14b/teacher_forcing.py --workdir=runs/stage1_14b \
        --config.teacher_from=runs/wan14b --config.data.source=latents:DIR --config.data.text=DIR/text

Not yet run; mesh and accumulate are for 128 chips of 95 GiB (TPU v5p:4x4x8). Compiled for them it needs 65.7 GiB per
chip:

    python -m greedy_distill_jax.compile train --config=configs/wan14b/teacher_forcing.py --topology=v5p:4x4x8
"""

from configs.wan1_3b import teacher_forcing


def get_config():
    """The 1.3B hyper-parameters, on 128 chips: 64 pairs, one video each."""
    config = teacher_forcing.get_config()
    config.model.size = "wan14b"
    config.data.accumulate = 1
    # A pair splits heads and MLP and not the frame: 780 tokens, half a frame, do not fill the kernels' tiles of 8.
    config.mesh.data, config.mesh.fsdp, config.mesh.context, config.mesh.tensor = 1, -1, 1, 2
    return config
