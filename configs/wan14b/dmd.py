"""Stage 2 at 14B: student, critic and teacher are 14B (docs/method.md, section 7).

    python -m greedy_distill_jax.train --config=configs/wan14b/dmd.py --workdir=runs/stage2_14b \
        --config.teacher_from=runs/wan14b --config.student_from=runs/stage1_14b --config.data.source=latents:DIR \
        --config.data.text=DIR/text

Not yet run; mesh and accumulate are for 128 chips of 95 GiB (TPU v5p:4x4x8): compiled, the generator's step needs
65.4 of 95.7 GiB per chip, the critic's 38.2:

    python -m greedy_distill_jax.compile train --config=configs/wan14b/dmd.py --topology=v5p:4x4x8
"""

from configs.wan1_3b import dmd


def get_config(arg: str = "critic"):
    """The 1.3B hyper-parameters; ``arg`` as there, on 128 chips: 64 pairs, one video each."""
    config = dmd.get_config(arg)
    config.model.size = "wan14b"
    config.data.accumulate = 1
    # A pair splits heads and MLP and not the frame: 780 tokens, half a frame, do not fill the kernels' tiles of 8.
    config.mesh.data, config.mesh.fsdp, config.mesh.context, config.mesh.tensor = 1, -1, 1, 2
    return config
