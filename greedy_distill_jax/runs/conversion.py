"""Weights of other programs as a run of ours, and the weights of a run as other programs read them."""

import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from greedy_distill_jax.config import base, read_settings
from greedy_distill_jax.diffusion.step_plan import StepPlan
from greedy_distill_jax.errors import UserError, about
from greedy_distill_jax.models.students.config import CausalConfig, StudentConfig
from greedy_distill_jax.models.students.make import make_student
from greedy_distill_jax.models.wan.config import WAN_SIZES, WanConfig
from greedy_distill_jax.models.wan.dit import Teacher
from greedy_distill_jax.runs.run import architecture
from greedy_distill_jax.storage.checkpoint import Checkpointer
from greedy_distill_jax.text.prompts import WAN_NEGATIVE_PROMPT
from greedy_distill_jax.weights.adapter import ADAPTERS, write_adapter
from greedy_distill_jax.weights.architecture import wan_of
from greedy_distill_jax.weights.health import FiniteSource
from greedy_distill_jax.weights.load import load
from greedy_distill_jax.weights.pipeline import read_shift, saved_codec
from greedy_distill_jax.weights.replacing import check_apart, replacing
from greedy_distill_jax.weights.source import ENCODER, Source
from greedy_distill_jax.weights.write import write

WAN_LATENT = (21, 60, 104)  # frames, rows and columns of 81 frames of 480 x 832 pixels
WAN_FPS = 16  # of its videos
WAN_SAMPLING = {"sampler": "unipc", "steps": 50, "guidance": 5.0}  # of a teacher, in Wan's pipeline of diffusers
# Of Self-Forcing and LongLive: 1000, 750, 500, 250 under this shift.
FEW_STEPS = {"sampler": "renoise", "steps": 4, "shift": 5.0, "guidance": 1.0}


def import_weights(
    source: Source,
    target: str | Path,
    *,
    dtype: str = "keep",
    sharding: Any = None,
    allow_nonfinite: bool = False,
    overwrite: bool = False,
) -> None:
    """Writes a source as a folder of ours: `checkpoints/0` with one network, and the JSON a run would have.

    Args:
      source: from `weights.open.open_source`.
      target: the folder.
      dtype: "keep" or a name of `weights.load.DTYPES`.
      sharding: as for `weights.load.load`; decides where the weights lie while they are written.
      allow_nonfinite: take NaN and infinite values as they are.
      overwrite: replace the target.

    Raises:
      UserError: a source that is ours already, values that are not finite, a tensor that cannot be read, a place that
        cannot be written.
    """
    if source.format == "ours" and "loras" not in source.meta:
        raise UserError(f"{source.path} is in our format already; use it as it is.", "path")
    check_apart(source.places, target)
    with replacing(target, overwrite=overwrite) as partial:
        params = load(source if allow_nonfinite else FiniteSource(source), sharding=sharding, dtype=dtype)
        largest = max(leaf.nbytes for leaf in jax.tree.leaves(params))
        limit = largest + 2**20  # writing one leaf at a time keeps the promise of streaming
        with Checkpointer(partial / "checkpoints", async_save=False, write_bytes=limit) as checkpointer:
            meta = _meta(source)
            checkpointer.save(0, {"nets": {meta["network"]: {"ema": params}}}, meta)
        if codec := saved_codec(source.path):
            shutil.copyfile(codec, partial / codec.name)


def _meta(source: Source) -> dict[str, Any]:
    """What a run writes beside its weights, for weights that no run of ours made; of a run, what it wrote itself."""
    name, part = source.path.name, source.meta.get("part", "")
    origin = dict(format=source.format, name=name, part=part, text=source.meta.get("text", ""))
    origin["loras"] = source.meta.get("loras", [])
    if source.format == "ours":
        return {key: value for key, value in source.meta.items() if key not in ("text", "loras")} | {"source": origin}
    cfg, wan, config = source.cfg, wan_of(source.cfg), base()
    sizes = {k: v for k, v in dataclasses.asdict(wan).items() if k in ("dim", "ffn_dim", "num_heads", "num_layers")}
    config.model.size = next((n for n, size in WAN_SIZES.items() if size.items() >= sizes.items()), "wan1_3b")
    for field in dataclasses.fields(WanConfig):
        config.model[field.name] = getattr(wan, field.name)
    latent_shape = source.meta.get("latent_shape") or (*WAN_LATENT, wan.channels)
    if isinstance(cfg, CausalConfig):
        latent_shape = (max(1, latent_shape[0] // cfg.chunk) * cfg.chunk, *latent_shape[1:])  # whole chunks
    config.data.frames = latent_shape[0]
    if origin["text"] == ENCODER:
        config.log.fps = WAN_FPS
    if isinstance(cfg, CausalConfig):
        config.stage, config.student.kind = "teacher_forcing", "causal"
        for name in ("chunk", "context", "context_weights"):
            config.student[name] = getattr(cfg, name)
        for name in config.student.causal:
            config.student.causal[name] = getattr(cfg, name)
        config.sample.update(FEW_STEPS)
    elif isinstance(cfg, WanConfig) and wan.prediction == "velocity":
        config.sample.update(WAN_SAMPLING, shift=_shift(source))
        if source.meta.get("naming") != "diffusers":
            config.sample.sampler = "unipc_wan"
        config.data.negative_prompt = WAN_NEGATIVE_PROMPT if origin["text"] == ENCODER else ""
    elif isinstance(cfg, StudentConfig):
        config.stage = "teacher_forcing"
        config.student.split = "/".join(",".join(map(str, layers)) for layers in (cfg.etm_layers, cfg.sdd_layers))
        for name in config.student:
            if hasattr(cfg, name):
                config.student[name] = getattr(cfg, name)
        if plan := source.meta.get("plan"):
            config.sample.update(_sample_keys({"shift": config.shift, **plan}))
    model = Teacher(cfg) if isinstance(cfg, WanConfig) else make_student(cfg)
    return dict(
        stage=config.stage,
        network="teacher" if isinstance(cfg, WanConfig) else "student",
        data_position=0,
        config=config.to_json_best_effort(),
        architecture=architecture(model),
        latent_shape=list(latent_shape),
        steps=0,
        source=origin,
    )


def _shift(source: Source) -> float:
    """The noise shift of a diffusers folder's scheduler, else Wan's."""
    folder = source.path if source.path.is_dir() else source.path.parent
    with about("path"):
        return read_shift(folder.parent if folder.name == "transformer" else folder)


def export_weights(source: Source, target: str | Path, form: str, **options: Any) -> None:
    """Writes as `weights.write.write`, with the codec of the run that they come from, and a student's step plan.

    An adapter is written as by `weights.adapter.write_adapter`.

    Raises:
      UserError: as there.
    """
    check_apart(source.places, target)
    if form in ADAPTERS:
        write_adapter(source, target, form, **options)
        return
    extra: dict[str, Any] = {}
    if source.format == "ours":
        extra["codec"] = saved_codec(source.path)
        if form == "torch-student":
            extra["student"] = _plan(source)
    write(source, target, form, **extra, **options)


def _plan(source: Source) -> dict[str, Any]:
    """What config.json of an exported student says besides the architecture: its step plan and its latents' shape."""
    stored = json.loads(source.meta["config"])
    config = base()
    config.stage = "teacher_forcing"  # a student's samplers
    config.update({name: stored[name] for name in ("shift", "sample") if name in stored})
    settings = read_settings(config)
    plan = dataclasses.asdict(settings.plan) | {"shift": settings.sample.shift}
    return {"plan": plan, "latent_shape": list(source.meta["latent_shape"])}


def _sample_keys(plan: Mapping[str, Any]) -> dict[str, Any]:
    """Values of ``config.sample`` that say the plan of an exported student; ``shift`` spaces other numbers of steps."""
    shift, context = plan["shift"], plan["context_sigmas"]
    steps = StepPlan.parse(plan["sigmas"], shift=shift, sampler=plan["sampler"], context_sigma=context)
    return {"shift": shift, **steps.values(shift)}
