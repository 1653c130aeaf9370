"""Streaming with the 1.3B student, one stream on every chip. Not yet run at full size.

    python -m greedy_distill_jax.compile train --config=configs/wan1_3b/sample.py --topology=v5e:2x2 --only=stream

which needs 9.2 of 15.75 GiB per chip, and 9.3 on v6e:2x2 and v5p:2x2x1. Sampling itself takes its settings from the
student's run; this file is what the compile check reads.
"""

from configs.wan1_3b import dmd


def get_config():
    """The distilled student's four re-noising steps; parameters whole on every chip."""
    config = dmd.get_config()
    config.data.accumulate = 1
    config.mesh.data, config.mesh.fsdp, config.mesh.context = -1, 1, 1
    return config
