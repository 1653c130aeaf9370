"""Floating-point operations of a job's updates, in closed form, from its config (networks: ``models.flops``)."""

from greedy_distill_jax.config import Settings
from greedy_distill_jax.losses import flow_matching, ode
from greedy_distill_jax.models.wan.config import WanConfig
from greedy_distill_jax.ops.attention.backends.record import FLASH_BACKWARD
from greedy_distill_jax.training.cost import OF_PAIR, Cost, Meter
from greedy_distill_jax.training.stages import rl_keys
from greedy_distill_jax.training.stages.base import Stage


def tokens_per_frame(latent_shape: tuple[int, int, int, int], wan: WanConfig) -> int:
    """Tokens of one latent frame of [T, H, W, C]."""
    return latent_shape[1] // wan.patch * (latent_shape[2] // wan.patch)


def assumed(settings: Settings) -> list[str]:
    """Terms whose loss is not the library's: they are taken to call every network they ask for once."""
    known = (*OF_PAIR, flow_matching, ode, *rl_keys.LOSSES)
    return sorted({term.name for term in settings.kind.all_terms(settings) if term.loss not in known})


def part_costs(
    settings: Settings, stage: Stage, latent_shape: tuple[int, int, int, int], *, backward: float = FLASH_BACKWARD
) -> dict[str, Cost]:
    """{part of the stage: its cost}.

    Args:
      settings, stage: as ``train.py`` has them.
      latent_shape: [T, H, W, C] of an example.
      backward: attention's backward pass over its forward pass, see ``Backend.backward_flops``.
    """
    tokens = tokens_per_frame(latent_shape, settings.wan)
    meter = Meter(settings.wan, settings.data.batch, latent_shape[0], tokens, backward)
    return settings.kind.costs(settings, stage, meter)
