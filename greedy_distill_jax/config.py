"""The configuration of a run: every key, typed and commented, and its translation into frozen dataclasses.

Files in ``configs/`` start from ``base()`` and change values; ``--config.key=value`` changes them again. Only this
module, ``train.py`` and the commands see a ConfigDict.
"""

import dataclasses
import difflib

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from greedy_distill_jax.diffusion import schedules
from greedy_distill_jax.losses import check_options, option_names, resolve
from greedy_distill_jax.models.wan_config import WAN_SIZES, CausalConfig, StudentConfig, WanConfig, split_layers
from greedy_distill_jax.steps import Term
from greedy_distill_jax.stream import Sampling
from greedy_distill_jax.types import UserError

RESERVED = ("loss", "grad_norm", "param_norm")
STAGES = ("teacher", "teacher_forcing")
KINDS = ("etm_sdd", "causal")
SHARED_BY_KINDS = ("kind", "chunk", "context", "context_noise")  # the other keys of config.student are of one kind


def base() -> ConfigDict:
    """Every key with its default. Keys that are absent here are errors everywhere."""
    c = ConfigDict()
    c.stage = "teacher"  # what is trained: "teacher" or "teacher_forcing" (stage 1 of the student)
    c.seed = 0  # parameters, data order and noise are functions of it
    c.steps = 1000  # optimiser updates
    c.teacher_from = ""  # run directory of the teacher a student starts from; "" for a random start

    c.data = ConfigDict()
    c.data.source = "moving_shapes"  # or "clips:DIR", a folder written by `prepare clips`
    c.data.size = 16  # pixels, moving_shapes only (clips have their own)
    c.data.frames = 8  # latent frames of one example
    c.data.batch = 32  # examples of one update, over all devices
    c.data.augment = "none"  # none | labelled (mirrored, recoloured, reversed; the caption says so): for few clips
    c.data.threads = 2  # reader threads of this process
    c.data.max_bad_records = 10  # unreadable records skipped before the run stops

    c.model = ConfigDict()
    c.model.size = "tiny"  # tiny | wan1_3b | wan14b: the values of the keys below that are left empty
    for field in dataclasses.fields(WanConfig):
        c.model[field.name] = placeholder(field.type if isinstance(field.type, type) else str)

    c.student = ConfigDict()  # see models.wan_config.StudentConfig (ETM + SDD) and CausalConfig
    c.student.kind = "etm_sdd"  # etm_sdd | causal (the baseline); a key that only the other has is an error
    c.student.split = "shallow_etm"  # interleaved | quality | cheap | copies | contiguous | shallow_etm | "0,1/0,1,2,3"
    c.student.fusion = "selfkv"  # selfkv | xattn2 | replace | add | concat | adaln
    c.student.chunk = 1  # latent frames made together
    c.student.window = 4  # ETM slots seen, the own one included
    c.student.sink = 0  # first ETM slots that stay visible on top of the window
    c.student.rope_mode = "clamped"  # clamped | absolute | fixed
    c.student.rope_frames = 0  # latent frames the teacher was trained at; 0 = data.frames
    c.student.context = "clean"  # clean | last_step_kv | fused (etm_sdd only)
    c.student.gate_init = 0.1  # initial gate of fusion xattn2
    c.student.context_noise = 0.0  # history is noised up to this level in training
    c.student.causal = ConfigDict()  # of kind causal
    c.student.causal.window = 12  # latent frames seen, sink and own chunk included; 0 = max_frames
    c.student.causal.sink = 3  # first latent frames that stay visible
    c.student.causal.max_frames = 0  # window 0 holds the whole history up to this length; 0 = data.frames
    c.student.causal.rope_mode = "absolute"  # absolute | relative (positions within the window: for endless streams)
    c.student.causal.recache = False  # a prompt switch recomputes the keys in the window

    c.losses = ConfigDict()  # name in the logs -> {loss, weight, options}; more names may be added
    c.losses.flow_matching = ConfigDict()
    c.losses.flow_matching.loss = "flow_matching"  # a built-in, "module:function" or "file.py:function"
    c.losses.flow_matching.weight = 1.0
    c.losses.flow_matching.options = ConfigDict()  # keyword arguments of the loss
    c.text_dropout = 0.1  # examples trained without text

    c.optimizer = ConfigDict()
    c.optimizer.name = "muon"  # muon (kernels; AdamW for the rest) | adamw
    c.optimizer.learning_rate = 2e-3  # AdamW
    c.optimizer.muon_rate = 2e-2  # Muon
    c.optimizer.new_scale = 1.0  # factor on the updates of parameters the teacher does not have
    c.optimizer.warmup = 30  # updates
    c.optimizer.final = 0.05  # rate at the end of the cosine, as a fraction of the peak; 1 = constant
    c.optimizer.betas = (0.9, 0.99)
    c.optimizer.weight_decay = 0.0
    c.optimizer.clip = 1.0  # global gradient norm, 0 = off
    c.ema = ConfigDict()
    c.ema.decay = 0.995
    c.ema.start = 100  # updates until which the average follows the parameters

    c.sample = ConfigDict()  # how samples are drawn during training, and the default of `sample`
    c.sample.steps = 16  # network evaluations per video (teacher) or per chunk (student)
    c.sample.first_steps = 0  # evaluations of the student's first chunk; 0 = as the others
    c.sample.shift = 8.0
    c.sample.sampler = "euler"  # euler | renoise (students)
    c.sample.guidance = 2.0  # CFG scale of the teacher; 1 = off

    c.mesh = ConfigDict()  # devices along each axis, -1 takes the rest
    c.mesh.data = -1
    c.mesh.fsdp = 1
    c.mesh.context = 1
    c.mesh.tensor = 1

    c.checkpoint = ConfigDict()
    c.checkpoint.every = 500  # updates
    c.checkpoint.keep = 2
    c.log = ConfigDict()
    c.log.every = 20  # updates between scalars
    c.log.samples_every = 1000  # updates between sample GIFs, 0 = never
    c.log.fps = 8  # of samples
    c.compile_cache = "~/.cache/greedy_distill_jax/xla"  # "" = none
    c.lock()
    c.losses.unlock()  # losses and their options are open; ``validate`` checks them against the functions
    return c


def validate(config: ConfigDict) -> None:
    """Raises UserError for an unknown or missing key, an unknown stage or a value no stage can run with."""
    _compare(config, base(), "config")
    if config.stage not in STAGES:
        raise UserError(f"config.stage is {config.stage!r}; choose from {', '.join(STAGES)}.")
    if config.model.size not in WAN_SIZES:
        raise UserError(f"config.model.size is {config.model.size!r}; choose from {', '.join(WAN_SIZES)}.")
    positive = ("steps", "data.batch", "data.frames", "checkpoint.every", "checkpoint.keep", "log.every", "log.fps")
    for key in (*positive, "sample.steps"):
        value = config
        for part in key.split("."):
            value = value[part]
        if value < 1:
            raise UserError(f"config.{key} is {value}; it must be at least 1.")
    for name, value in (("text_dropout", config.text_dropout), ("ema.decay", config.ema.decay)):
        if not 0 <= value <= 1:
            raise UserError(f"config.{name} is {value}; it must lie between 0 and 1.")
    wan_config(config)
    terms(config)
    if config.stage != "teacher":
        student = student_config(config)
        if config.data.frames % student.chunk:
            raise UserError(
                f"config.data.frames is {config.data.frames}, which does not divide into chunks of "
                f"config.student.chunk = {student.chunk}; choose a multiple of {student.chunk}."
            )
        sampling(config)


def _compare(config, reference, path: str) -> None:
    free = path == "config.losses" or path.endswith(".options")
    unknown = [key for key in config if key not in reference] if not free else []
    if unknown:
        close = difflib.get_close_matches(unknown[0], list(reference), 1)
        hint = f"did you mean {path}.{close[0]}?" if close else f"known keys: {', '.join(reference)}."
        raise UserError(f"{path}.{unknown[0]} is not a configuration key; {hint}")
    if not free:
        missing = [key for key in reference if key not in config]
        if missing:
            raise UserError(f"{path}.{missing[0]} is missing; start your config from greedy_distill_jax.config.base().")
    for key, value in config.items():
        if path == "config.losses":
            if key in RESERVED:
                raise UserError(f"config.losses.{key}: this name is taken in the logs; choose another.")
            unknown = sorted(set(value) - {"loss", "weight", "options"})
            if unknown or not {"loss", "weight"} <= set(value):
                raise UserError(f"config.losses.{key} needs the keys loss, weight and options; it has {sorted(value)}.")
        elif isinstance(value, ConfigDict) and key in reference:
            _compare(value, reference[key], f"{path}.{key}")


def _user_errors(make):
    try:
        return make()
    except (ValueError, TypeError, ZeroDivisionError) as error:
        raise error if isinstance(error, UserError) else UserError(f"config: {error}") from error


def wan_config(config: ConfigDict) -> WanConfig:
    """The DiT's size: the named one with the non-empty keys of ``config.model`` on top."""
    changes = {k: v for k, v in config.model.items() if k != "size" and v is not None}
    return _user_errors(lambda: WanConfig(**{**WAN_SIZES[config.model.size], **changes}))


def _refuse_keys_of_another_kind(config: ConfigDict) -> None:
    kind = config.student.kind
    if kind not in KINDS:
        raise UserError(f"config.student.kind is {kind!r}; choose from {', '.join(KINDS)}.")

    def flat(student):
        own = {f"causal.{key}": value for key, value in student.causal.items()}
        return own | {key: value for key, value in student.items() if key not in ("causal", *SHARED_BY_KINDS)}

    values = flat(config.student)
    for key, default in flat(base().student).items():
        if key.startswith("causal.") != (kind == "causal") and values[key] != default:
            raise UserError(
                f"config.student.{key} is {values[key]!r}, but config.student.kind = {kind!r} does not use it; leave "
                f"it at {default!r} or choose another kind."
            )


def student_config(config: ConfigDict) -> StudentConfig | CausalConfig:
    """The student made from that DiT."""
    wan = wan_config(config)
    _refuse_keys_of_another_kind(config)

    def make():
        if config.student.kind == "causal":
            own = config.student.causal.to_dict()
            own["max_frames"] = own["max_frames"] or config.data.frames
            return CausalConfig(base=wan, chunk=config.student.chunk, context=config.student.context, **own)
        fields = {k: v for k, v in config.student.items() if k not in ("kind", "split", "context_noise", "causal")}
        fields["rope_frames"] = fields["rope_frames"] or config.data.frames
        etm, sdd = split_layers(config.student.split, wan.num_layers)
        return StudentConfig(base=wan, etm_layers=etm, sdd_layers=sdd, **fields)

    return _user_errors(make)


def sampling(config: ConfigDict, steps: int | None = None, first_steps: int | None = None) -> Sampling:
    """How the student denoises a chunk; arguments override ``config.sample``."""
    s = config.sample
    steps = steps or s.steps
    first = first_steps or s.first_steps or steps

    def make():
        lists = [schedules.uniform_steps(n, s.shift) for n in ((first, steps) if first != steps else (steps,))]
        return Sampling(tuple(lists), s.sampler)

    return _user_errors(make)


def terms(config: ConfigDict) -> list[Term]:
    """The weighted losses. For a student, options "per_frame" and "group" default to one noise level per chunk."""
    out = []
    for name, term in config.losses.items():
        loss, options = resolve(term.loss), dict(term.get("options", {}))
        check_options(term.loss, loss, options)
        takes = option_names(loss)
        if config.stage != "teacher":  # every chunk has a noise level of its own, as when streaming
            options = {k: v for k, v in (("group", config.student.chunk), ("per_frame", True)) if k in takes} | options
        elif options.get("draws", 1) != 1:
            raise UserError(f"config.losses.{name}.options.draws: a teacher sees all frames of its input; use 1.")
        out.append(Term(name, loss, float(term.weight), options))
    if not out:
        raise UserError("config.losses is empty; name at least one loss.")
    return out
