"""Optimisers: AdamW, and Muon for kernels, with their rate schedules."""

import jax
import optax


def decay_schedule(peak: float, *, steps: int, warmup: int, final: float) -> optax.Schedule:
    """Linear warm-up to ``peak`` and cosine decay to ``final * peak``; final 1 keeps it constant."""
    if final == 1.0:
        return optax.linear_schedule(0.0 if warmup else peak, peak, max(warmup, 1))
    return optax.warmup_cosine_decay_schedule(0.0, peak, warmup, max(steps, warmup + 1), final * peak)


def muon_dimensions(params):
    """Which leaves Muon takes, and their matrix axes: kernels only, the layers axis of scanned ones apart.

    optax's default (every 2-D leaf) would hand Muon the stacked biases [layers, D] and leave out the stacked
    kernels [layers, in, out].
    """

    def label(path, leaf):
        if getattr(path[-1], "key", None) != "kernel":
            return None
        return optax.contrib.MuonDimensionNumbers(leaf.ndim - 2, leaf.ndim - 1)

    return jax.tree_util.tree_map_with_path(label, params)


def make_optimizer(
    name: str,
    *,
    steps: int,
    learning_rate: float,
    warmup: int,
    final: float,
    betas: tuple[float, float],
    weight_decay: float,
    clip: float,
    muon_rate: float,
) -> optax.GradientTransformation:
    """AdamW, or Muon for kernels with AdamW for everything else, behind global-norm clipping.

    Args:
      name: "adamw" or "muon".
      steps, warmup, final: of the schedule, see ``decay_schedule``.
      learning_rate: peak rate of AdamW (with "muon": of the leaves Muon does not take).
      betas, weight_decay: of AdamW.
      clip: global gradient norm; 0 turns clipping off.
      muon_rate: peak rate of Muon.
    """
    schedule = decay_schedule(learning_rate, steps=steps, warmup=warmup, final=final)
    if name == "adamw":
        optimizer = optax.adamw(schedule, b1=betas[0], b2=betas[1], weight_decay=weight_decay)
    elif name == "muon":
        optimizer = optax.contrib.muon(
            decay_schedule(muon_rate, steps=steps, warmup=warmup, final=final),
            adam_learning_rate=schedule,
            adam_b1=betas[0],
            adam_b2=betas[1],
            adam_weight_decay=weight_decay,
            muon_weight_dimension_numbers=muon_dimensions,
        )
    else:
        raise ValueError(f"optimizer {name!r} is unknown; choose 'adamw' or 'muon'.")
    return optax.chain(optax.clip_by_global_norm(clip), optimizer) if clip else optimizer
