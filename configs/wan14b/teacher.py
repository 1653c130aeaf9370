"""The Wan2.1 14B teacher: flow matching (docs/method.md, section 2.7).

    python -m greedy_distill_jax.train --config=configs/wan14b/teacher.py --workdir=runs/wan14b \
        --config.data.source=latents:DIR --config.data.text=DIR/text

Not yet run; mesh and accumulate are for 128 chips of 95 GiB (TPU v5p:4x4x8). Compiled for them it needs 36.4 GiB per
chip:

    python -m greedy_distill_jax.compile train --config=configs/wan14b/teacher.py --topology=v5p:4x4x8
"""

from configs.wan1_3b import teacher


def get_config():
    """The 1.3B recipe at 14B, on 128 chips: 64 pairs, one video each."""
    config = teacher.get_config()
    config.model.size = "wan14b"
    config.data.accumulate = 1
    # A pair splits heads and MLP and not the frame: 780 tokens, half a frame, do not fill the kernels' tiles of 8.
    config.mesh.data, config.mesh.fsdp, config.mesh.context, config.mesh.tensor = 1, -1, 1, 2
    return config
