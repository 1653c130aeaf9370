"""Optimisers: AdamW, and Muon for kernels, with their rate schedules."""

import jax
import jax.numpy as jnp
import optax

from greedy_distill_jax.config.keys import Optimizer


def decay_schedule(peak: float, *, steps: int, warmup: int, final: float) -> optax.Schedule:
    """Linear warm-up to ``peak`` and cosine decay to ``final * peak``; final 1 keeps it constant."""
    if final == 1.0:
        return optax.linear_schedule(0.0 if warmup else peak, peak, max(warmup, 1))
    return optax.warmup_cosine_decay_schedule(0.0, peak, warmup, max(steps, warmup + 1), final * peak)


def muon_dimensions(params):
    """Which leaves Muon takes, and their matrix axes: kernels or their factors, the layers axis of scanned ones apart.

    optax's default (every 2-D leaf) would hand Muon the stacked biases [layers, D] and leave out the stacked
    kernels [layers, in, out].
    """

    def label(path, leaf):
        if jax.tree_util.keystr(path[-1:], simple=True) not in ("kernel", "lora_A", "lora_B"):
            return None
        return optax.contrib.MuonDimensionNumbers(leaf.ndim - 2, leaf.ndim - 1)

    return jax.tree_util.tree_map_with_path(label, params)


def make_optimizer(o: Optimizer, *, steps: int) -> optax.GradientTransformation:
    """AdamW, or Muon for kernels with AdamW for everything else, behind global-norm clipping.

    Args:
      o: name and rates.
      steps: updates of the run, over which the rates decay.
    """
    schedule = decay_schedule(o.learning_rate, steps=steps, warmup=o.warmup, final=o.final)
    if o.name == "adamw":
        optimizer = optax.adamw(schedule, b1=o.betas[0], b2=o.betas[1], weight_decay=o.weight_decay)
    elif o.name == "muon":
        optimizer = optax.contrib.muon(
            decay_schedule(o.muon_rate, steps=steps, warmup=o.warmup, final=o.final),
            adam_learning_rate=schedule,
            adam_b1=o.betas[0],
            adam_b2=o.betas[1],
            adam_weight_decay=o.weight_decay,
            muon_weight_dimension_numbers=muon_dimensions,
        )
    else:
        raise ValueError(f"optimizer {o.name!r} is unknown; choose 'adamw' or 'muon'.")
    return optax.chain(optax.clip_by_global_norm(o.clip), optimizer) if o.clip else optimizer


def new_parameter_scale(scale: float):
    """Factors on updates: ``scale`` for student parameters that no teacher has, 1 for the rest."""

    def factors(params):
        def factor(path, leaf):
            names = {getattr(k, "key", "") for k in path}
            norm_of_etm = {"etm", "norm"} <= names and "blocks" not in names
            fresh = norm_of_etm or names & {"z_k", "z_v", "norm_z", "z_in", "z_gate", "bos"}
            return jnp.asarray(scale if fresh else 1.0, leaf.dtype).reshape((1,) * leaf.ndim)

        return jax.tree_util.tree_map_with_path(factor, params)

    return factors
