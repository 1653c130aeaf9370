"""What a stage is: the contract between a file in this folder and the one training loop."""

import abc
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import optax

from greedy_distill_jax.codecs.protocol import VideoCodec
from greedy_distill_jax.config.keys import TransformerOptimizer
from greedy_distill_jax.config.settings import Settings, check_student, terms_of
from greedy_distill_jax.errors import UserError
from greedy_distill_jax.losses import Term, is_number
from greedy_distill_jax.models import flops
from greedy_distill_jax.models.motion_head import MotionHead
from greedy_distill_jax.models.students.base import StreamingModel
from greedy_distill_jax.models.students.make import make_student
from greedy_distill_jax.models.wan.config import WanConfig
from greedy_distill_jax.models.wan.dit import Teacher
from greedy_distill_jax.training.cost import Cost, Meter, draws, total
from greedy_distill_jax.training.lora import lora
from greedy_distill_jax.training.optimizer import make_optimizer, new_parameter_scale
from greedy_distill_jax.training.sources import Wanted
from greedy_distill_jax.training.state import Net, TrainState
from greedy_distill_jax.training.update import Update


class Part(NamedTuple):
    """One function of a step: ``call(state, frozen, batch, carry) -> (state, metrics, carry)`` where ``due(step)``.

    Steps count from 1; the loop sets ``state.step``, the number of steps that are finished. ``carry`` is a dictionary
    of arrays, empty at the start of a step, that the parts of a step hand on to each other. A part is jitted and its
    state donated, unless it is a ``host`` part: that gets the rows of its process (``distribution.rows.Rows``, numpy
    arrays) as its batch, with "captions", and carry, None as its state and frozen networks, and runs as it is; rows of
    its process in the carry that it returns, or numbers that are the same in all, are put together again. Between a
    rollout and an update it may ask a reward outside. ``losses``: where its terms stand, for errors. ``order``: parts
    of one name are given the same batch; the parts of another name than "" see the data in an order of their own, and
    only batches of steps they are due in. ``takes``: shapes of what it takes of the carry, by name, for a job that is
    only compiled. ``gives``: shapes of what a host part adds; without, parts behind it are traced when they first run.
    """

    name: str
    due: Callable[[int], bool]
    call: Callable
    host: bool = False
    losses: str = "config.losses"
    order: str = ""
    takes: Mapping[str, jax.ShapeDtypeStruct] = MappingProxyType({})
    gives: Mapping[str, jax.ShapeDtypeStruct] = MappingProxyType({})


def returned(part: Part, out: Any) -> tuple[Any, Mapping[str, Any], Mapping[str, Any]]:
    """What a part returned, if it is (state, metrics, carry) with scalars as metrics; else UserError."""
    wanted = "return (state, metrics, carry), the last two as dictionaries"
    if not isinstance(out, tuple) or len(out) != 3 or not all(isinstance(x, Mapping) for x in out[1:]):
        held = f" of {len(out)}" if isinstance(out, tuple) else ""
        raise UserError(f"part {part.name} returned a {type(out).__name__}{held}; {wanted}.")
    for name, metric in out[1].items():
        if not is_number(metric, ()):
            held = f"{list(metric.shape)}" if hasattr(metric, "shape") else f"a {type(metric).__name__}"
            raise UserError(f"part {part.name} returned the metric {name!r} as {held}; a metric is one number.")
    return out


class Network(NamedTuple):
    """A network that a stage trains.

    start_from: sources whose parameters it takes, the first that there is; with none of them it is random.
    copy_of: the network whose first parameters it takes instead.
    part: name of the part that updates it, "" for the first one.
    target: its average is one for losses, and nothing is sampled from it.
    """

    model: Teacher | StreamingModel | MotionHead
    update: Update
    start_from: tuple[str, ...] = ()
    copy_of: str = ""
    part: str = ""
    target: bool = False


class Stage(NamedTuple):
    """A stage with its settings: what the training loop needs to know.

    networks: those it trains; the first is the one it is named for, which samples are made with.
    frozen: parameters of networks that are not trained, by name.
    parts: of a step, in order.
    """

    networks: Mapping[str, Network]
    frozen: Mapping[str, Any]
    parts: tuple[Part, ...]

    @property
    def name(self) -> str:
        """Of the network that the stage is named for."""
        return next(iter(self.networks))

    @property
    def model(self) -> Teacher | StreamingModel:
        """The network that the stage is named for."""
        return self.networks[self.name].model

    def state(self, params: Mapping[str, Any]) -> TrainState:
        """Step 0, from the first parameters of every network."""
        nets = {}
        for name, network in self.networks.items():
            ema = jax.tree.map(jnp.copy, params[name]) if network.update.ema_decay is not None else None
            nets[name] = Net(params[name], ema, network.update.optimizer.init(params[name]))
        return TrainState(jnp.int32(0), nets)

    def needed(self, sources: Mapping[str, Any]) -> tuple[str, ...]:
        """Names of the sources that networks start from: one that only scores is not among them."""
        chosen = (next((s for s in n.start_from if s in sources), None) for n in self.networks.values())
        return tuple(dict.fromkeys(name for name in chosen if name))

    def initial_params(self, key, latent_shape, given: Mapping[str, Any]) -> dict[str, Any]:
        """First parameters of every network.

        Args:
          key: of a random start, and of what the sources do not have.
          latent_shape: (T, H, W, C) of an example.
          given: parameters of sources, as far as there are any. Shapes do not depend on it.
        """
        given = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), dict(given))  # converted weights may be bfloat16
        out: dict[str, Any] = {}
        for name, network in self.networks.items():
            source = next((s for s in network.start_from if s in given), None)
            if network.copy_of:
                out[name] = jax.tree.map(jnp.copy, out[network.copy_of])
            elif source is None:
                out[name] = network.model.init(key, latent_shape)
            elif isinstance(network.model, StreamingModel) and source == "teacher":
                out[name] = network.model.from_teacher(key, given[source], latent_shape)
            else:
                out[name] = given[source]
        return out


class Inputs(NamedTuple):
    """What a stage is built of besides its settings.

    frozen: parameters (or their shapes) of the networks that ``StageKind.wanted`` calls frozen, by name.
    null_MC: the unconditional text rows. latent_shape: (T, H, W, C) of an example. source, codec: of the data, None for
    a job that is only compiled.
    """

    frozen: Mapping[str, Any]
    null_MC: Any
    latent_shape: tuple[int, int, int, int]
    source: Any = None
    codec: VideoCodec | None = None


class StageKind(abc.ABC):
    """A kind of stage: subclass it in a file of its own, and name an instance in ``config.stages``.

    Attributes:
      trains: "teacher" or "student": the network it is named for.
      keys: groups of configuration keys that it alone has, name -> frozen dataclass.
      kept: dotted keys that a resumed run must have as they were, besides those of every stage.
      offers: networks that losses may ask for.
    """

    trains = "student"
    keys: ClassVar[Mapping[str, type]] = {}
    kept: tuple[str, ...] = ()
    offers: tuple[str, ...] = ()

    def check(self, settings: Settings) -> None:
        """Raises UserError for settings that the stage cannot run with."""
        check_student(settings)

    def terms(self, settings: Settings) -> tuple[Term, ...]:
        """The losses of the network it is named for: of a student, one noise level per chunk, as when streaming."""
        chunk = settings.student_config.chunk
        return terms_of(settings.losses, "config.losses", settings, offered=self.offers, chunk_of=lambda loss: chunk)

    def all_terms(self, settings: Settings) -> tuple[Term, ...]:
        """The losses of all its networks."""
        return settings.terms

    def costs(self, settings: Settings, stage: "Stage", meter: Meter) -> dict[str, Cost]:
        """Floating-point operations of its parts, by name: here, of one part that calls its network for every term."""
        if len(stage.parts) > 1:
            raise UserError(
                f"stage {settings.stage} has several parts and does not say what they cost; define costs()."
            )
        (part,) = stage.parts
        if self.trains == "teacher":
            calls = (flops.teacher(settings.wan, meter.frames * n, meter.tokens) for n in draws(settings.terms))
        else:
            calls = (flops.student(stage.model.cfg, meter.frames, meter.tokens, n) for n in draws(settings.terms))
        return {part.name: meter.cost(total(calls))}

    def model(self, settings: Settings) -> Teacher | StreamingModel:
        """The network it is named for."""
        return make_student(settings.student_config) if self.trains == "student" else Teacher(settings.wan)

    @abc.abstractmethod
    def wanted(self, settings: Settings) -> dict[str, Wanted]:
        """The runs that it starts from or asks, by the names that ``Network.start_from`` uses."""

    def check_source(self, settings: Settings, source: Any) -> None:  # noqa: B027 (most accept all)
        """Raises UserError when the data is not what it trains on."""

    def batch_shapes(self, settings: Settings, latent_shape, source: Any = None) -> dict[str, jax.ShapeDtypeStruct]:
        """What it takes of a batch: the examples' latents [B, T, H, W, C] and text rows [B, M, D].

        Args:
          latent_shape: (T, H, W, C) of an example.
          source: of the data; None for a job that is only compiled.
        """
        return {
            "latents": jax.ShapeDtypeStruct((settings.data.batch, *latent_shape), jnp.float32),
            **text_shape(settings),
        }

    def sizes(self, settings: Settings) -> tuple[WanConfig, ...]:
        """Of all networks that it runs."""
        return (settings.wan,)

    def check_sources(self, settings: Settings, sources: Mapping[str, Any]) -> None:  # noqa: B027 (most accept all)
        """Raises UserError when a loaded run cannot serve."""

    def check_codec(self, settings: Settings, codec: VideoCodec) -> None:  # noqa: B027 (most accept all)
        """Raises UserError when it cannot train on latents of this codec."""

    def check_metrics(self, settings: Settings, step: int, metrics: Mapping[str, float]) -> None:  # noqa: B027
        """Raises UserError where the metrics of a step show that the training cannot work."""

    def example_frames(self, settings: Settings) -> int:
        """Latent frames that it takes of an example."""
        return settings.data.frames

    @abc.abstractmethod
    def build(self, settings: Settings, inputs: Inputs) -> Stage:
        """The stage: networks, frozen parameters, parts."""


def text_shape(settings: Settings) -> dict[str, jax.ShapeDtypeStruct]:
    """A batch of text rows, which is all that a stage without data takes."""
    shape = (settings.data.batch, settings.wan.text_len, settings.wan.text_dim)
    return {"text": jax.ShapeDtypeStruct(shape, jnp.float32)}


def always(step: int) -> bool:
    """``Part.due`` of a part of every step."""
    return True


def optimizer_of(settings: Settings, updates: int, group: str = "") -> optax.GradientTransformation:
    """The optimiser of a transformer that is updated ``updates`` times in the run; ``group``: of keys that it is in."""
    keys, path = (settings.own[group], f"config.{group}") if group else (settings, "config")
    o: TransformerOptimizer = keys.optimizer
    return lora(make_optimizer(o, steps=updates), o.lora, seed=settings.seed, path=f"{path}.optimizer.lora")


def own_update(settings: Settings, updates: int) -> Update:
    """How the network that a stage is named for is updated, ``updates`` times in the run."""
    scale = settings.optimizer.new_scale
    factors = None if scale == 1.0 else new_parameter_scale(scale)
    return Update(optimizer_of(settings, updates), settings.ema.decay, settings.ema.start, factors)
