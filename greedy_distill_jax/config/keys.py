"""The configuration of a run: every key, typed and commented, and its translation into frozen dataclasses.

Files in ``configs/`` start from ``base()`` and change values; ``--config.key=value`` changes them again. Only this
module, ``train.py`` and the commands see a ConfigDict.
"""

import dataclasses
import difflib
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import FieldReference, placeholder

from greedy_distill_jax.diffusion import solvers
from greedy_distill_jax.diffusion.step_plan import StepPlan
from greedy_distill_jax.errors import UserError
from greedy_distill_jax.losses import asks_scores, check_options, option_names, resolve
from greedy_distill_jax.models.students.config import CausalConfig, StudentConfig, split_layers
from greedy_distill_jax.models.wan.config import WAN_SIZES, WanConfig
from greedy_distill_jax.training import policy_gradient, rollout
from greedy_distill_jax.training.update import Term

RESERVED = ("loss", "grad_norm", "param_norm")
STAGES = ("teacher", "teacher_forcing", "dmd")
REAL = ("joint", "autoregressive", "per_frame")
FAKE = ("critic", "self_sg", "self_fm", "self_ema", "stage1")
OPEN_KEYS = ("losses", "critic.losses")  # below these, keys may be added
KINDS = ("etm_sdd", "causal")
GONE = {
    "config.sample.first_steps": "write it into config.sample.steps: 4,2 is four steps for the first chunk, then two"
}
SHARED_BY_KINDS = ("kind", "chunk", "context", "context_noise")  # the other keys of config.student are of one kind


def base() -> ConfigDict:
    """Every key with its default. Keys that are absent here are errors everywhere."""
    c = ConfigDict()
    c.stage = "teacher"  # teacher | teacher_forcing (stage 1 of the student) | dmd (stage 2: on its own videos)
    c.seed = 0  # parameters, data order and noise are functions of it
    c.steps = 1000  # optimiser updates
    c.teacher_from = ""  # run directory of the teacher a student is cut from, and that stage "dmd" asks for scores
    c.critic_from = ""  # run directory of the teacher that the critic of stage "dmd" starts from; "" = teacher_from
    c.student_from = ""  # run directory of the student that stage "dmd" (or more of stage 1) starts from

    c.data = ConfigDict()
    c.data.source = "moving_shapes"  # or "moving_shapes:wandering", "clips:DIR" (a folder by `prepare clips`)
    c.data.size = 16  # pixels, moving_shapes only (clips have their own)
    c.data.frames = 8  # latent frames of one example
    c.data.batch = 32  # examples of one update, over all devices
    c.data.accumulate = 1  # microbatches of one update: batch = accumulate x microbatch, and a microbatch is spread out
    c.data.augment = "none"  # none | labelled (mirrored, recoloured, reversed; the caption says so): for few clips
    c.data.text = ""  # embedded words, or a folder by `prepare text`, or a model folder with text_encoder/
    c.data.negative_prompt = ""  # stands where there is no text: dropped in training, unconditional in guidance
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
    c.student.anchor = True  # SDD sees frame 0; without it long streams drift
    c.student.context_noise = 0.0  # history is noised up to this level in training
    c.student.causal = ConfigDict()  # of kind causal
    c.student.causal.window = 12  # latent frames seen, sink and own chunk included; 0 = max_frames
    c.student.causal.sink = 3  # first latent frames that stay visible
    c.student.causal.max_frames = 0  # window 0 holds the whole history up to this length; 0 = data.frames
    c.student.causal.rope_mode = "absolute"  # absolute | relative (positions within the window: for endless streams)
    c.student.causal.recache = False  # a prompt switch recomputes the keys in the window

    c.losses = _losses("flow_matching")  # name in the logs -> {loss, weight, options}; more names may be added
    c.text_dropout = 0.1  # examples trained without text

    c.optimizer = _optimizer()
    c.optimizer.new_scale = 1.0  # factor on the updates of parameters the teacher does not have
    c.distill = ConfigDict()  # stage "dmd" only
    c.distill.real = "joint"  # teacher score: joint (bidirectional) | autoregressive (stage 1, frozen) | per_frame
    c.distill.fake = "critic"  # student score: critic | self_sg | self_fm | self_ema | stage1 (frozen)
    c.distill.teacher_size = ""  # the teacher's, a name as in model.size (a 14B teacher of a 1.3B student); "" = model
    c.distill.guidance = 4.0  # CFG scale of the teacher score; 1 = off
    c.distill.pg = "rollout_trunc"  # rollout_trunc | rollout_full | actor_critic, see policy_gradient.py
    c.distill.segment = 0  # rollout_full: chunks through which later frames give credit to earlier ones, 0 = all
    c.distill.epochs = 1  # actor_critic: updates per rollout
    c.distill.anchor = 0.0  # actor_critic: weight of (action - action of the rollout)^2
    c.distill.frames = 0  # length of a rollout; beyond data.frames the scores see random windows; 0 = data.frames
    c.distill.exit = "random"  # denoising step that makes the frames of a rollout: random | last
    c.distill.context_grad_etm = "params"  # ETM learns through z: params | none
    c.distill.context_grad_sdd = "none"  # SDD learns through its keys of earlier frames: params | none
    c.distill.generator_every = 5  # steps from one generator update to the next; the critic is updated in every step
    c.distill.critic_warmup = 0  # steps before the first generator update
    c.critic = ConfigDict()  # distill.fake "critic" only
    c.critic.losses = _losses("flow_matching")
    c.critic.optimizer = _optimizer()
    c.ema = ConfigDict()
    c.ema.decay = 0.995
    c.ema.start = 100  # updates until which the average follows the parameters

    c.sample = ConfigDict()  # how samples are drawn during training, and the default of `sample`
    # Network evaluations per video (teacher) or per chunk (student). A student takes one entry per chunk, too, of which
    # the last repeats: (4, 3, 2); an entry may list noise levels: ((1.0, 0.93, 0.36), (1.0, 0.36)).
    c.sample.steps = FieldReference(16, field_type=object)
    # Noise level at which the student's finished chunks are kept for later ones, 0 = clean. The first chunk stays
    # clean, unless there is one level per chunk, of which the last repeats.
    c.sample.context_sigma = FieldReference(0.0, field_type=object)
    c.sample.shift = 8.0
    c.sample.sampler = "euler"  # euler | unipc (teachers; Wan's default) | renoise (students)
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
    for losses in (c.losses, c.critic.losses):
        losses.unlock()  # losses and their options are open; ``validate`` checks them against the functions
    return c


def _losses(name: str) -> ConfigDict:
    losses = ConfigDict({name: ConfigDict()})
    losses[name].loss = name  # a built-in, "module:function" or "file.py:function"
    losses[name].weight = 1.0
    losses[name].options = ConfigDict()  # keyword arguments of the loss
    return losses


def _optimizer() -> ConfigDict:
    o = ConfigDict()
    o.name = "muon"  # muon (kernels; AdamW for the rest) | adamw
    o.learning_rate = 2e-3  # AdamW
    o.muon_rate = 2e-2  # Muon
    o.warmup = 30  # updates
    o.final = 0.05  # rate at the end of the cosine, as a fraction of the peak; 1 = constant
    o.betas = (0.9, 0.99)
    o.weight_decay = 0.0
    o.clip = 1.0  # global gradient norm, 0 = off
    return o


def validate(config: ConfigDict) -> None:
    """Raises UserError for an unknown or missing key, an unknown stage or a value no stage can run with."""
    _compare(config, base(), "config")
    if config.stage not in STAGES:
        raise UserError(f"config.stage is {config.stage!r}; choose from {', '.join(STAGES)}.")
    if config.model.size not in WAN_SIZES:
        raise UserError(f"config.model.size is {config.model.size!r}; choose from {', '.join(WAN_SIZES)}.")
    positive = ("steps", "data.batch", "data.frames", "checkpoint.every", "checkpoint.keep", "log.every", "log.fps")
    for key in positive:
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
    if config.stage == "teacher":
        if config.sample.sampler not in solvers.SOLVERS:
            raise UserError(
                f"config.sample.sampler is {config.sample.sampler!r}; a teacher's are {', '.join(solvers.SOLVERS)}."
            )
        if not isinstance(config.sample.steps, int) or config.sample.steps < 1:
            raise UserError(f"config.sample.steps is {config.sample.steps!r}; a teacher takes a number of at least 1.")
        if config.sample.context_sigma:
            raise UserError(
                f"config.sample.context_sigma is {config.sample.context_sigma}, but a teacher makes whole videos; "
                "leave it at 0."
            )
    else:
        student = student_config(config)
        if config.data.frames % student.chunk:
            raise UserError(
                f"config.data.frames is {config.data.frames}, which does not divide into chunks of "
                f"config.student.chunk = {student.chunk}; choose a multiple of {student.chunk}."
            )
        plan = step_plan(config)
        if config.student.context_noise and not plan.keeps_clean:
            raise UserError(
                f"config.student.context_noise is {config.student.context_noise}, but config.sample.context_sigma = "
                f"{config.sample.context_sigma} says the history's noise level; set one of them to 0."
            )
    if config.data.accumulate < 1 or config.data.batch % config.data.accumulate:
        raise UserError(
            f"config.data.accumulate is {config.data.accumulate}, which does not divide config.data.batch = "
            f"{config.data.batch}; choose a divisor."
        )
    if config.stage == "dmd":
        _validate_distillation(config)
    if config.distill.teacher_size and (config.stage != "dmd" or config.distill.real == "autoregressive"):
        raise UserError(
            f"config.distill.teacher_size is {config.distill.teacher_size!r}, but only stage dmd with a teacher uses "
            f"it, not stage {config.stage} with real {config.distill.real!r}; leave it empty."
        )


def _validate_distillation(config: ConfigDict) -> None:
    d = config.distill
    for key, choices in (
        ("real", REAL), ("fake", FAKE), ("pg", policy_gradient.PG), ("exit", rollout.EXITS),
        ("context_grad_etm", ("params", "none")), ("context_grad_sdd", ("params", "none")),
    ):  # fmt: skip
        if d[key] not in choices:
            raise UserError(f"config.distill.{key} is {d[key]!r}; choose from {', '.join(choices)}.")
    for key, least in (("generator_every", 1), ("epochs", 1), ("segment", 0), ("critic_warmup", 0)):
        if d[key] < least:
            raise UserError(f"config.distill.{key} is {d[key]}; it must be at least {least}.")
    if not config.student_from:
        raise UserError("config.student_from is empty; stage dmd starts from a stage-1 student, name its run.")
    if d.fake == "critic":
        critic_terms(config)
    elif d.generator_every != 1 or d.critic_warmup:
        raise UserError(
            f"config.distill.fake is {d.fake!r}: there is no critic to update between generator updates; set "
            f"config.distill.generator_every=1 and config.distill.critic_warmup=0."
        )
    if d.pg == "actor_critic" and config.data.accumulate > 1:
        raise UserError(
            "config.distill.pg is 'actor_critic', whose epochs need the gradient of the whole batch; set "
            "config.data.accumulate=1."
        )
    if d.teacher_size and d.teacher_size not in WAN_SIZES:
        raise UserError(
            f"config.distill.teacher_size is {d.teacher_size!r}; choose from {', '.join(WAN_SIZES)}, or leave it empty."
        )
    other_size = d.teacher_size and teacher_config(config) != wan_config(config)
    if other_size and (d.fake, d.real) == ("critic", "joint") and not config.critic_from:
        raise UserError(
            f"config.critic_from is empty, and the critic cannot start from a teacher of size {d.teacher_size!r}; name "
            f"the run of a teacher with the architecture of config.model."
        )
    if d.pg == "rollout_full" and "none" in (d.context_grad_etm, d.context_grad_sdd):
        raise UserError(
            "config.distill.pg is 'rollout_full', which differentiates through the contexts; set "
            "config.distill.context_grad_etm=params and config.distill.context_grad_sdd=params."
        )
    for key, pg in (("segment", "rollout_full"), ("epochs", "actor_critic"), ("anchor", "actor_critic")):
        default = base().distill[key]
        if d.pg != pg and d[key] != default:
            raise UserError(
                f"config.distill.{key} is {d[key]}, but only config.distill.pg = {pg!r} uses it, not {d.pg!r}; leave "
                f"it at {default}."
            )
    if config.student.kind == "causal" and d.context_grad_etm != "params":
        raise UserError(
            "config.distill.context_grad_etm is 'none', but a causal student has no ETM; leave it at 'params'."
        )
    if d.critic_warmup >= config.steps:
        raise UserError(
            f"config.distill.critic_warmup is {d.critic_warmup}, config.steps {config.steps}: the student would never "
            f"be updated; train longer or warm up less."
        )
    frames = d.frames or config.data.frames
    if frames < config.data.frames or frames % config.student.chunk:
        raise UserError(
            f"config.distill.frames is {frames}; it must be 0 or a multiple of config.student.chunk = "
            f"{config.student.chunk} from config.data.frames = {config.data.frames} on."
        )
    if frames > config.data.frames and (d.real, d.fake) != ("joint", "critic"):
        raise UserError(
            f"config.distill.frames is {frames}, beyond config.data.frames = {config.data.frames}: only real 'joint' "
            f"and fake 'critic' can judge a window without what came before it."
        )
    chunks = frames // config.student.chunk
    if d.segment and chunks % d.segment:
        raise UserError(f"config.distill.segment is {d.segment}, which does not divide the {chunks} chunks of a video.")
    on_scores = [asks_scores(term.loss) for term in terms(config)]
    if not any(on_scores):
        raise UserError("config.losses has no loss that asks for scores; stage dmd needs one, such as 'dmd'.")
    if config.student.context_noise and all(on_scores) and (d.real, d.fake) == ("joint", "critic"):
        raise UserError(
            f"config.student.context_noise is {config.student.context_noise}, but bidirectional scores see no history "
            f"and no other loss asks the student for a velocity; leave it at 0."
        )
    if d.fake == "self_fm" and all(on_scores):
        raise UserError(
            "config.distill.fake is 'self_fm', but nothing keeps the student a score of its own videos; add a term "
            "such as config.losses.own with the loss 'flow_matching'."
        )
    if d.fake == "stage1" and d.real == "autoregressive":
        raise UserError(
            "config.distill: real 'autoregressive' and fake 'stage1' are the same network: no gradient; change one."
        )


def frozen_networks(config: ConfigDict) -> set[str]:
    """Networks that stage "dmd" asks for scores: "teacher", "stage1"."""
    if config.stage != "dmd":
        return set()
    d = config.distill
    return ({"stage1"} if d.real == "autoregressive" else {"teacher"}) | ({"stage1"} if d.fake == "stage1" else set())


def _compare(config, reference, path: str) -> None:
    is_losses = path.removeprefix("config.") in OPEN_KEYS
    free = is_losses or path.endswith(".options")
    unknown = [key for key in config if key not in reference] if not free else []
    if unknown:
        close = difflib.get_close_matches(unknown[0], list(reference), 1)
        hint = f"did you mean {path}.{close[0]}?" if close else f"known keys: {', '.join(reference)}."
        hint = GONE.get(f"{path}.{unknown[0]}", hint)
        raise UserError(f"{path}.{unknown[0]} is not a configuration key; {hint}")
    if not free:
        missing = [key for key in reference if key not in config]
        if missing:
            raise UserError(f"{path}.{missing[0]} is missing; start from base() of greedy_distill_jax.config.keys.")
    for key, value in config.items():
        if is_losses:
            if key in RESERVED:
                raise UserError(f"{path}.{key}: this name is taken in the logs; choose another.")
            unknown = sorted(set(value) - {"loss", "weight", "options"})
            if unknown or not {"loss", "weight"} <= set(value):
                raise UserError(f"{path}.{key} needs the keys loss, weight and options; it has {sorted(value)}.")
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


def teacher_config(config: ConfigDict) -> WanConfig:
    """The DiT that stage "dmd" asks for the real score; precision, remat and text are those of ``config.model``."""
    shared = ("text_dim", "text_len", "dtype", "remat")
    size = WAN_SIZES.get(config.distill.teacher_size, {})
    return dataclasses.replace(wan_config(config), **{k: v for k, v in size.items() if k not in shared})


def check_runs(config: ConfigDict) -> None:
    """Raises UserError for a run that is named and not used; apart from ``validate``, as ``compile`` names them all."""
    d = config.distill
    if config.critic_from and (config.stage, d.fake, d.real) != ("dmd", "critic", "joint"):
        raise UserError(
            f"config.critic_from is {config.critic_from!r}, but only stage dmd with fake 'critic' and real 'joint' "
            f"uses it, not stage {config.stage} with {d.fake!r} and {d.real!r}; leave it empty."
        )


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


def step_plan(config: ConfigDict, steps: Any = None) -> StepPlan:
    """How the student denoises its chunks and keeps them; ``steps`` takes the place of ``config.sample.steps``."""
    s = config.sample
    try:
        plan = StepPlan.parse(
            s.steps if steps is None else steps, shift=s.shift, sampler=s.sampler, context_sigma=s.context_sigma
        )
        plan.check_context(config.student.context)
    except UserError as error:
        keys = ("sampler", "context_sigma") if steps is not None else ("steps", "sampler", "context_sigma")
        raise error.at({key: f"config.sample.{key}" for key in keys}) from error
    return plan


def terms(config: ConfigDict) -> list[Term]:
    """The weighted losses of the trained network.

    For a student, options "per_frame" and "group" default to one noise level per chunk, as when streaming; a loss that
    asks a bidirectional teacher for scores keeps one per video.
    """
    return _terms(config, config.losses, "config.losses", teacher_forced=config.stage != "teacher")


def critic_terms(config: ConfigDict) -> list[Term]:
    """The same of the critic: bidirectional beside a bidirectional teacher score, teacher-forced beside the others."""
    found = _terms(config, config.critic.losses, "config.critic.losses", teacher_forced=config.distill.real != "joint")
    for term in found:
        if asks_scores(term.loss):
            raise UserError(f"config.critic.losses.{term.name}: the critic's losses get no scores; use flow_matching.")
    return found


def _terms(config: ConfigDict, losses: ConfigDict, path: str, *, teacher_forced: bool) -> list[Term]:
    out = []
    for name, term in losses.items():
        loss, options = resolve(term.loss), dict(term.get("options", {}))
        check_options(term.loss, loss, options)
        takes = option_names(loss)
        asks = asks_scores(loss)
        if asks and config.stage != "dmd":
            raise UserError(f"{path}.{name}: {term.loss!r} asks for scores ({', '.join(asks)}); use it in stage dmd.")
        per_frame = teacher_forced and not (asks and config.distill.real == "joint")
        if per_frame:  # every chunk has a noise level of its own, as when streaming
            options = {k: v for k, v in (("group", config.student.chunk), ("per_frame", True)) if k in takes} | options
        elif not asks and options.get("draws", 1) != 1:
            raise UserError(f"{path}.{name}.options.draws: a bidirectional network sees every frame it gets; use 1.")
        out.append(Term(name, loss, float(term.weight), options))
    if not out:
        raise UserError(f"{path} is empty; name at least one loss.")
    return out


def greedy_distill_paper(config: ConfigDict) -> ConfigDict:
    """Makes a stage-2 config the published setting: a bidirectional teacher, the student itself as the fake score.

    Source: METHOD_SPEC E.1, E.5. There is no critic, so every step updates the student.
    """
    config.distill.real, config.distill.fake, config.distill.pg = "joint", "self_sg", "rollout_trunc"
    config.distill.generator_every, config.distill.critic_warmup = 1, 0
    return config
