"""Floating-point operations of a job's updates, in closed form, from its config (networks: ``flops.py``)."""

from collections.abc import Sequence
from typing import NamedTuple

from greedy_distill_jax.config import Settings
from greedy_distill_jax.losses import Term, asked, dmd, flow_matching
from greedy_distill_jax.models.wan.config import WanConfig
from greedy_distill_jax.models.wan.dit import Teacher
from greedy_distill_jax.ops.attention.backends.record import FLASH_BACKWARD
from greedy_distill_jax.pods import flops
from greedy_distill_jax.pods.flops import Flops
from greedy_distill_jax.training.stages.base import Stage
from greedy_distill_jax.training.stages.dmd import critic_terms, teacher_config


class Cost(NamedTuple):
    """One update of the whole batch. ``executed`` counts what is computed again, too."""

    model: Flops
    executed: Flops


def tokens_per_frame(latent_shape: tuple[int, int, int, int], wan: WanConfig) -> int:
    """Tokens of one latent frame of [T, H, W, C]."""
    return latent_shape[1] // wan.patch * (latent_shape[2] // wan.patch)


def assumed(settings: Settings) -> list[str]:
    """Terms whose loss is not the library's: they are taken to call every network they ask for once."""
    losses = [*settings.terms, *(critic_terms(settings) if settings.stage == "dmd" else ())]
    return sorted({term.name for term in losses if term.loss not in (dmd, flow_matching)})


def _draws(terms: Sequence[Term]) -> list[int]:
    """Noise draws of every term that calls the network that is trained."""
    return [int(term.options.get("draws", 1)) for term in terms if term.loss is not dmd]


def _calls(terms: Sequence[Term], score: str, draws: int) -> int:
    """How often a score is called: once per draw of the pair, and once by every term that asks for it by itself."""
    asks = [asked(term.loss) for term in terms]
    return draws * any("pair" in names for names in asks) + sum(score in names for names in asks)


def part_costs(
    settings: Settings, stage: Stage, latent_shape: tuple[int, int, int, int], *, backward: float = FLASH_BACKWARD
) -> dict[str, Cost]:
    """{part of the stage: its cost}.

    Args:
      settings, stage: as ``train.py`` has them.
      latent_shape: [T, H, W, C] of an example.
      backward: attention's backward pass over its forward pass, see ``Backend.backward_flops``.
    """
    wan, frames = settings.wan, latent_shape[0]
    tokens, batch = tokens_per_frame(latent_shape, wan), settings.data.batch
    terms = settings.terms

    def cost(trained: Flops, fixed: Flops = Flops(), repeated: int = 0) -> Cost:  # noqa: B008 (immutable)
        executed = trained.executed(wan.remat, backward) + trained * repeated + fixed
        return Cost((trained * flops.TRAINED + fixed) * batch, executed * batch)

    def total(calls) -> Flops:
        return sum(calls, Flops())

    if settings.stage == "teacher":
        return {"teacher": cost(total(flops.teacher(wan, frames * n, tokens) for n in _draws(terms)))}
    cfg = stage.model.cfg

    def student(n: int = 1) -> Flops:
        return flops.student(cfg, frames, tokens, n)

    if settings.stage == "teacher_forcing":
        return {"teacher_forcing": cost(total(map(student, _draws(terms))))}
    d = settings.own["distill"]
    length, plan = d.frames or frames, settings.plan
    own = flops.rollout(cfg, length, tokens, plan, d.exit)
    teacher = teacher_config(settings)
    real = {
        "joint": lambda: flops.teacher(teacher, frames, tokens),
        "autoregressive": student,
        "per_frame": lambda: flops.teacher(teacher, frames, tokens, frames) * (frames // cfg.chunk),
    }[d.real]() * (1 if d.guidance == 1.0 else 2)
    critic_net = stage.networks.get("critic")
    joint_critic = critic_net is not None and isinstance(critic_net.model, Teacher)
    fake = flops.teacher(wan, frames, tokens) if joint_critic else student()
    fixed = own + real * _calls(terms, "real", d.draws) + fake * _calls(terms, "fake", d.draws)
    nets = total(map(student, _draws(terms)))
    if d.pg == "rollout_full":
        act, epochs, repeated = flops.replay(cfg, length, tokens), 1, 1  # every chunk is checkpointed
    else:
        act, epochs, repeated = flops.student(cfg, length, tokens), d.epochs if d.pg == "actor_critic" else 1, 0
    judged = nets if d.pg == "actor_critic" else Flops()  # once more for the loss, before the first epoch
    acting, losing = cost(act * epochs, repeated=repeated), cost(nets * epochs, fixed + judged)
    critic = [flops.teacher(wan, frames * n, tokens) if joint_critic else student(n)
              for n in _draws(critic_terms(settings))] if critic_net else []  # fmt: skip
    return {
        "dmd": Cost(*(a + b for a, b in zip(acting, losing, strict=True))),
        "critic": cost(total(critic), own),
    }
