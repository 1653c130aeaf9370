"""Tiny configurations and parameters that are nowhere zero."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from greedy_distill_jax.config import base, read_settings
from greedy_distill_jax.models.students.config import CausalConfig, StudentConfig
from greedy_distill_jax.models.wan.config import WAN_SIZES, WanConfig
from greedy_distill_jax.models.wan.dit import Teacher
from greedy_distill_jax.training.stages import base as stage_base
from greedy_distill_jax.training.stages.base import Inputs

BASE = WanConfig(
    **{
        **WAN_SIZES["tiny"],
        "dim": 24,
        "ffn_dim": 32,
        "num_heads": 2,
        "num_layers": 3,
        "freq_dim": 8,
        "channels": 4,
        "text_dim": 6,
        "text_len": 3,
    }
)
STUDENT = StudentConfig(base=BASE, etm_layers=(0, 1), sdd_layers=(0, 1, 2), window=3, rope_frames=6)


def student_config(**changes) -> StudentConfig:
    """``STUDENT`` with some fields changed."""
    return dataclasses.replace(STUDENT, **changes)


def causal_config(**changes) -> CausalConfig:
    """Chunks of one frame, window 4 with sink 1, some fields changed."""
    return CausalConfig(**{"base": BASE, "chunk": 1, "window": 4, "sink": 1, "max_frames": 8, **changes})


@functools.lru_cache(maxsize=64)
def _shapes(network, cfg, latent_shape):
    return jax.eval_shape(lambda key: network(cfg).init(key, latent_shape), jax.random.key(0))


def random_params(model, seed: int = 0, latent_shape: tuple[int, int, int, int] = (1, 4, 4, 4)):
    """Parameters of a model's tree with no leaf zero or one: zero-initialised heads and gates would hide errors.

    Drawn with numpy from the shapes alone, because compiling an ``init`` takes longer than most tests.
    """
    shapes = _shapes(type(model), model.cfg, latent_shape)
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        value = rng.standard_normal(leaf.shape)
        if path[-1].key == "kernel":
            return jnp.asarray(value / np.sqrt(leaf.shape[-2]), leaf.dtype)
        return jnp.asarray((path[-1].key == "scale") + 0.3 * value, leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def train_config(stage: str = "teacher", **changes):
    """A run of a few steps; ``changes`` are dotted keys with "__" for ".": ``data__batch=8``.

    With AdamW, because a quarter of the time that a step with Muon takes to compile goes into Muon's unrolled
    iteration, and with a constant rate, because one that decays writes the number of steps into the program: runs that
    differ only there share one.
    """
    config = base()
    config.stage, config.steps = stage, 6
    if stage == "dmd":
        del config.losses["flow_matching"]
        config.losses.dmd = dict(loss="dmd", weight=1.0, options={})
        config.distill.generator_every = 2
        config.student_from, config.teacher_from = "a run", "a run"
    config.model.dim, config.model.ffn_dim, config.model.num_layers = 24, 32, 2
    config.model.freq_dim, config.model.text_dim, config.model.text_len = 8, 8, 6
    config.data.batch, config.data.frames = 8, 4
    if changes.get("student__kind") != "causal":
        config.student.window = 2
    config.checkpoint.every, config.log.every, config.log.samples_every = 3, 1, 0
    config.optimizer.name, config.optimizer.final = "adamw", 1.0
    if stage == "dmd":
        config.critic.optimizer.name, config.critic.optimizer.final = "adamw", 1.0
    config.optimizer.warmup, config.ema.start, config.compile_cache = 1, 2, ""
    config.sample.steps = 2
    for key, value in changes.items():
        if key == "losses__flow_matching__options":
            config.losses.flow_matching.options.update(value)
        else:
            config.update_from_flattened_dict({key.replace("__", "."): value})
    return config


def stage_of(config, latent_shape: tuple[int, int, int, int], seed: int = 0, codec=None):
    """(stage, first parameters of its networks by name), as ``train`` builds them, from random networks."""
    settings = read_settings(config, imagine_runs=True)
    wanted, wan = settings.kind.wanted(settings), settings.wan
    nets = {
        name: Teacher(want.architecture) if isinstance(want.architecture, WanConfig) else settings.kind.model(settings)
        for name, want in wanted.items()
        if name != "critic" and (want.frozen or name != "teacher" or settings.is_student)
    }
    given = {name: random_params(net, seed + (name == "student"), latent_shape) for name, net in nets.items()}
    frozen = {want.frozen: given[name] for name, want in wanted.items() if want.frozen}
    null = np.zeros((wan.text_len, wan.text_dim), np.float32)
    stage = settings.kind.build(settings, Inputs(frozen, null, latent_shape, codec=codec))
    if not settings.is_student:
        given = {"teacher": random_params(stage.model, seed, latent_shape)}
    return stage, stage.initial_params(jax.random.key(seed), latent_shape, given)


def descend(monkeypatch, rate: float) -> None:
    """Plain gradient descent in every stage: the update is the gradient times ``rate``."""
    monkeypatch.setattr(stage_base, "make_optimizer", lambda *args, **kwargs: optax.sgd(rate))


def call_of(part):
    """A part that neither takes nor hands on anything: ``call(state, frozen, batch) -> (state, metrics)``."""
    return lambda state, frozen, batch: part.call(state, frozen, batch, {})[:2]


def text_rows(batch: int, key, base: WanConfig = BASE):
    """Random encoder rows."""
    return jax.random.normal(key, (batch, base.text_len, base.text_dim), jnp.float32)
