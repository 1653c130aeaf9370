"""Stage 3 at 14B: a stage-2 student learns from rewards of its own long videos (docs/method.md, section 10).

    python -m greedy_distill_jax.train --config=configs/wan14b/rl.py --workdir=runs/stage3_14b \
        --config.student_from=runs/stage2_14b --config.data.source=prompts:captions.csv --config.data.text=DIR/text
"""

from configs.wan1_3b import rl


def get_config(arg: str = "nft"):
    """The 1.3B hyper-parameters; ``arg`` as there, on 128 chips of 95 GiB."""
    config = rl.get_config(arg)
    config.model.size = "wan14b"
    config.data.accumulate = 1
    config.mesh.data, config.mesh.fsdp, config.mesh.context, config.mesh.tensor = 1, -1, 4, 2
    return config
