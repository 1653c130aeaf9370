"""Every configuration key, as frozen dataclasses: a field is a key, its default the key's, its comment what it does.

Its annotation says which values it may have (``greedy_distill_jax.ranges``); ``read_settings`` refuses others.
``tree.config_of`` makes a ConfigDict of them for files and command lines, ``tree.read`` the dataclasses of one again.
The keys of one stage alone stand in that stage's file (``training.stages``).
"""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any

from greedy_distill_jax.models.students.config import CONTEXT_WEIGHTS
from greedy_distill_jax.models.wan.config import WAN_SIZES
from greedy_distill_jax.ranges import (
    Count,
    Fraction,
    Frames,
    Momentum,
    Natural,
    NotNegative,
    Positive,
    Range,
    Seed,
    at_least,
    between,
    one_of,
)

Size = Annotated[int, between(1, 2**20)]  # of an axis of parameters or of a batch
AxisSize = Annotated[int, at_least(1, also=-1)]


@dataclasses.dataclass(frozen=True)
class Data:
    """What is trained on."""

    source: str = "moving_shapes"  # or moving_shapes:wandering; clips:DIR, latents:DIR, ode:DIR, prompts:FILE
    size: Annotated[int, between(8, 4096)] = 16  # pixels, moving_shapes only (clips have their own)
    frames: Frames = 8  # latent frames of one example
    batch: Size = 32  # examples of one update, over all devices
    accumulate: Count = 1  # microbatches of one update: batch = accumulate x microbatch, and a microbatch is spread out
    augment: str = "none"  # none | labelled (mirrored, recoloured, reversed; the caption says so): for few clips
    text: str = ""  # embedded words, or a folder by `prepare text`, or a model folder with text_encoder/
    negative_prompt: str = ""  # stands where there is no text: dropped in training, unconditional in guidance
    threads: Annotated[int, between(0, 1024)] = 2  # reader threads per order of the data (`Part.order`), 0 = none
    max_bad_records: Natural = 10  # unreadable records skipped before the run stops


@dataclasses.dataclass(frozen=True)
class Model:
    """The DiT: a named size, and what is to differ from it (fields of ``models.wan.config.WanConfig``)."""

    size: Annotated[str, one_of(*WAN_SIZES)] = "tiny"  # the values of the keys below that are left empty
    dim: Size | None = None  # width D
    ffn_dim: Size | None = None  # width of the feed-forward layers
    num_heads: Size | None = None
    num_layers: Annotated[int, between(1, 4096)] | None = None
    channels: Size | None = None  # of the latents
    patch: Size | None = None  # side of the square of latents that is one token
    freq_dim: Size | None = None  # of the sinusoid that embeds the noise level
    text_dim: Size | None = None  # width of a text row
    text_len: Size | None = None  # text rows
    eps: Annotated[float, Range(0, 1, with_low=False)] | None = None  # of the norms
    prediction: str | None = None  # velocity (Wan's weights) | x0
    dtype: str | None = None  # bfloat16 | float32, of matmuls
    gradient_dtype: str | None = None  # float32 | compute (of kernels' gradients: dtype; half as much to send and hold)
    remat: str | None = None  # none | full (recompute each block) | dots (keep matmul results)
    gate_init: float | None = None  # added to both residual gates at initialisation
    text_init: NotNegative | None = None  # standard deviation of the text embedding at initialisation
    time_init: NotNegative | None = None  # standard deviation of the time embedding at initialisation


@dataclasses.dataclass(frozen=True)
class Causal:
    """Keys of the causal student alone, see ``models.students.config.CausalConfig``."""

    window: Natural = 12  # latent frames seen, sink and own chunk included; 0 = max_frames
    sink: Natural = 3  # first latent frames that stay visible
    max_frames: Natural = 0  # window 0 holds the whole history up to this length; 0 = data.frames
    rope_mode: str = "absolute"  # absolute | relative (positions within the window: for endless streams)
    recache: bool = False  # a prompt switch recomputes keys
    recache_of: str = "ring"  # ring | window (LongLive: an older chunk joins in, and early the sink)
    global_sink: bool = True  # of the latter: the sink outlives a switch; False: the window's oldest frames become it


@dataclasses.dataclass(frozen=True)
class Student:
    """The student made of that DiT, see ``models.students.config``; keys of the other kind are refused."""

    kind: Annotated[str, one_of("etm_sdd", "causal")] = "etm_sdd"  # causal is the baseline
    split: str = "shallow_etm"  # interleaved | quality | cheap | copies | contiguous | shallow_etm | "0,1/0,1,2,3"
    fusion: str = "selfkv"  # selfkv | xattn2 | replace | add | concat | adaln
    chunk: Frames = 1  # latent frames made together
    window: Count = 4  # ETM slots seen, the own one included
    sink: Natural = 0  # first ETM slots that stay visible on top of the window
    rope_mode: str = "clamped"  # clamped | absolute | fixed
    rope_frames: Natural = 0  # latent frames the teacher was trained at; 0 = data.frames
    context: str = "clean"  # clean | last_step_kv | fused (etm_sdd only)
    gate_init: float = 0.1  # initial gate of fusion xattn2
    anchor: bool = True  # SDD sees frame 0; without it long streams drift
    etm_input: str = "kept"  # kept | clean: what ETM reads where sample.context_sigma keeps chunks at a noise level
    context_noise: Fraction = 0.0  # history is noised up to this level in training
    # Of the pass that writes a finished chunk's keys: the denoising network's | own (a copy that learns for itself).
    context_weights: Annotated[str, one_of(*CONTEXT_WEIGHTS)] = "shared"
    causal: Causal = dataclasses.field(default_factory=Causal)  # of kind causal


@dataclasses.dataclass(frozen=True)
class Loss:
    """One weighted term of a sum of losses."""

    loss: str = ""  # a built-in, "module:function" or "file.py:function"
    weight: NotNegative = 1.0
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # keyword arguments of the loss


Losses = Mapping[str, Loss]  # name in the logs -> term; names may be added in a configuration


@dataclasses.dataclass(frozen=True)
class Reward:
    """One reward of those that a stage asks."""

    reward: str = ""  # a built-in, "module:function" or "file.py:function"
    weight: float = 1.0  # among the others, 0 or less too
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # keyword arguments of the reward
    judge: bool = False  # logged, never optimised
    low: float | None = None  # a value below it is a fault: it counts as not judged
    high: float | None = None  # or above this


Rewards = Mapping[str, Reward]  # name in the logs -> reward; names may be added in a configuration
TERMS = {Losses: Loss, Rewards: Reward}  # keys whose names are open, and what stands under each


def flow_matching_alone() -> Losses:
    """The default of every sum of losses."""
    return {"flow_matching": Loss("flow_matching")}


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """How gradients become updates."""

    name: Annotated[str, one_of("muon", "adamw")] = "muon"  # muon (kernels; AdamW for the rest) | adamw
    learning_rate: Positive = 2e-3  # AdamW
    muon_rate: Positive = 2e-2  # Muon
    warmup: Natural = 30  # updates
    final: Fraction = 0.05  # rate at the end of the cosine, as a fraction of the peak; 1 = constant
    betas: tuple[Momentum, Momentum] = (0.9, 0.99)
    weight_decay: NotNegative = 0.0  # of AdamW; Muon's kernels have none
    clip: NotNegative = 1.0  # global gradient norm (with LoRA of the factors' gradient), 0 = off


@dataclasses.dataclass(frozen=True)
class Lora:
    """Low-rank factors that are trained in place of parameters, see docs/method.md, section 2.8."""

    rank: Annotated[int, between(0, 2**16)] = 0  # of the factors; 0 = all parameters are trained
    alpha: Positive | None = None  # the product of the factors counts alpha / rank times; empty = rank
    targets: str = "q,k,v,o,up,down"  # linears of the blocks that have factors; all other parameters stay as they are

    @property
    def scale(self) -> float:
        """How often the product of the factors counts."""
        return 1.0 if self.alpha is None else self.alpha / self.rank


@dataclasses.dataclass(frozen=True)
class TransformerOptimizer(Optimizer):
    """The optimiser of a transformer."""

    lora: Lora = dataclasses.field(default_factory=Lora)


@dataclasses.dataclass(frozen=True)
class OwnOptimizer(TransformerOptimizer):
    """The optimiser of the network that the stage is named for."""

    new_scale: NotNegative = 1.0  # factor on the updates of parameters the teacher does not have


@dataclasses.dataclass(frozen=True)
class Ema:
    """The exponential moving average of the parameters, which samples and students are made from."""

    decay: Momentum = 0.995
    start: Natural = 100  # steps until which the average follows the parameters


@dataclasses.dataclass(frozen=True)
class Sample:
    """How samples are drawn during training, and the default of `sample`."""

    # Network evaluations per video (teacher) or per chunk (student). A student takes one entry per chunk, too, of which
    # the last repeats: (4, 3, 2); an entry may list noise levels: ((1.0, 0.93, 0.36), (1.0, 0.36)).
    steps: Any = 16
    # Noise level at which the student's finished chunks are kept for later ones, 0 = clean. The first chunk stays
    # clean, unless there is one level per chunk, of which the last repeats.
    context_sigma: Any = 0.0
    shift: Positive | None = None  # empty = config.shift
    # euler | unipc (teachers; Wan's default, levels as in diffusers) | unipc_wan (as in Wan's own) | renoise (students)
    sampler: str = "euler"
    guidance: NotNegative = 2.0  # CFG scale of the teacher; 1 = off


@dataclasses.dataclass(frozen=True)
class Mesh:
    """Devices along each axis, -1 takes the rest."""

    data: AxisSize = -1
    fsdp: AxisSize = 1
    context: AxisSize = 1
    tensor: AxisSize = 1


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """When a run is saved."""

    every: Count = 500  # updates
    keep: Count = 2


@dataclasses.dataclass(frozen=True)
class Log:
    """What a run says of itself."""

    every: Count = 20  # updates between scalars
    samples_every: Natural = 1000  # updates between sample GIFs, 0 = never
    fps: Annotated[int, between(1, 50)] = 8  # of samples, which are GIFs


@dataclasses.dataclass(frozen=True)
class Keys:
    """All keys that do not belong to one stage alone."""

    stage: str = "teacher"  # a name in config.stages, which lists what each trains
    seed: Seed = 0  # parameters, data order and noise are functions of it
    steps: Count = 1000  # optimiser updates
    # Noise shift of training and sampling: of losses that draw levels, of the levels at which scores are asked, and of
    # samplers; each may be given one of its own.
    shift: Positive = 5.0
    teacher_from: str = ""  # run directory of the teacher that a student is cut from, or that losses ask for scores
    critic_from: str = ""  # run directory of the teacher that the critic of stage "dmd" starts from; "" = teacher_from
    student_from: str = ""  # run directory of the student that a stage starts from
    data: Data = dataclasses.field(default_factory=Data)
    model: Model = dataclasses.field(default_factory=Model)
    student: Student = dataclasses.field(default_factory=Student)
    losses: Losses = dataclasses.field(default_factory=flow_matching_alone)  # name in the logs -> a weighted loss
    text_dropout: Fraction = 0.1  # examples trained without text
    optimizer: OwnOptimizer = dataclasses.field(default_factory=OwnOptimizer)
    ema: Ema = dataclasses.field(default_factory=Ema)
    sample: Sample = dataclasses.field(default_factory=Sample)
    mesh: Mesh = dataclasses.field(default_factory=Mesh)
    checkpoint: Checkpoint = dataclasses.field(default_factory=Checkpoint)
    log: Log = dataclasses.field(default_factory=Log)
    compile_cache: str = "~/.cache/greedy_distill_jax/xla"  # folder that keeps compiled programs; "" = none
