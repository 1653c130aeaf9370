"""Stages 1 and 2 at 1.3B on one NVIDIA card of 80 or 141 GB, or on the eight of a host: H100, H200.

    XLA_PYTHON_CLIENT_MEM_FRACTION=.93 python -m greedy_distill_jax.train \
        --config=configs/wan1_3b/nvidia.py:teacher_forcing@h100:1 --workdir=runs/stage1 \
        --config.teacher_from=runs/wan1_3b --config.data.source=latents:DIR --config.data.text=DIR/text

The settings of ``teacher.py``, ``teacher_forcing.py``, ``causal.py`` or ``dmd.py``, the global batch of 64 included,
for cards that each hold a whole video. jax takes three quarters of a card unless XLA_PYTHON_CLIENT_MEM_FRACTION says
otherwise.

Not yet run with this batch. Compiled, the generator's step of stage 2 needs 71.6 of 73.6 GiB on one H100, 74.8 of 131.1
on an H200 and 29.0 on each of eight H100, stage 1 55.1 on one H100 (cuDNN's calls are estimated: docs/pods.md):

    python -m greedy_distill_jax.compile train --config=configs/wan1_3b/nvidia.py:dmd@h100:1 --topology=h100:1
"""

from configs.wan1_3b import causal, dmd, teacher, teacher_forcing

CONFIGS = {
    "teacher": teacher.get_config,
    "teacher_forcing": teacher_forcing.get_config,
    "causal": causal.get_config,
    "dmd": dmd.get_config,
}
CARDS = {"h100:1": 1, "h200:1": 1, "h100:8": 8, "h200:8": 8}


def get_config(arg: str):
    """``arg``: FILE@CARDS or FILE:ARG@CARDS, such as "dmd@h100:8" or "dmd:diagonal@h200:1"."""
    settings, _, cards = arg.rpartition("@")
    file, _, own = settings.partition(":")
    if file not in CONFIGS or cards not in CARDS:
        raise ValueError(f"{arg!r} is not FILE@CARDS; FILE is one of {', '.join(CONFIGS)}, CARDS of {', '.join(CARDS)}")
    config = CONFIGS[file](own) if own else CONFIGS[file]()
    config.data.accumulate = config.data.batch // CARDS[cards]
    config.mesh.data, config.mesh.fsdp, config.mesh.context = 1, -1, 1
    return config
