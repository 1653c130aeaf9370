"""Stage 3 at 14B: a stage-2 student learns from rewards of its own long videos (docs/method.md, section 10).

    python -m greedy_distill_jax.train --config=configs/wan14b/rl.py --workdir=runs/stage3_14b \
        --config.student_from=runs/stage2_14b --config.data.source=prompts:captions.csv --config.data.text=DIR/text

Not yet run, nor compiled; mesh and batch are for 128 chips of 95 GiB (TPU v5p:4x4x8):

    python -m greedy_distill_jax.compile train --config=configs/wan14b/rl.py --topology=v5p:4x4x8
"""

from configs.wan1_3b import rl


def get_config(arg: str = "nft"):
    """The 1.3B hyper-parameters and a shorter clip; ``arg`` as there, on 128 chips: 32 groups of 4, a prompt each."""
    config = rl.get_config(arg)
    config.model.size = "wan14b"
    config.data.batch = max(config.data.batch, 32)
    config.data.accumulate = config.data.batch // 32
    # The gradient keeps the caches of all chunks of the clip, here 5.2 GiB for each of a stream's; see docs/pods.md.
    config.rl.clip = 4
    config.mesh.data, config.mesh.fsdp, config.mesh.context, config.mesh.tensor = 1, -1, 1, 4
    return config
