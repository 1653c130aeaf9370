"""The causal baseline at 1.3B: Self-Forcing's and LongLive's student by teacher forcing (docs/method.md, section 4).

    python -m greedy_distill_jax.train --config=configs/wan1_3b/causal.py:longlive --workdir=runs/causal \
        --config.teacher_from=runs/wan1_3b --config.data.source=latents:DIR --config.data.text=DIR/text

Not yet run. Compiled for TPU v6e:4x4 with a whole video per chip it needs 22.2 of 31.24 GiB per chip:

    python -m greedy_distill_jax.compile train --config=configs/wan1_3b/causal.py --topology=v6e:4x4 \
        --config.mesh.context=1 --config.data.accumulate=4

Attention, chunk and the four re-noising steps are the published ones of the distilled students; before
distillation the model needs more: `--config.sample.sampler=euler --config.sample.steps=50`.
"""

from configs.wan1_3b import teacher


def get_config(arg: str = "longlive"):
    """``arg``: "longlive" (window of 12 frames, sink 3, recache) or "self_forcing" (all 21 frames, no sink)."""
    if arg not in ("longlive", "self_forcing"):
        raise ValueError(f"{arg!r} is not one of longlive, self_forcing")
    config = teacher.get_config()
    config.stage = "teacher_forcing"
    config.student.kind = "causal"
    config.student.chunk = 3
    own = config.student.causal
    own.window, own.sink, own.recache = (12, 3, True) if arg == "longlive" else (0, 0, False)
    own.recache_of = "window" if arg == "longlive" else "ring"
    config.sample.steps = 4  # with shift 5: t = 1000, 937.5, 833.3, 625
    config.sample.sampler = "renoise"
    config.sample.guidance = 1.0
    return config
