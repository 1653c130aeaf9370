"""A training run that is ready to start: networks, data and jitted parts. Every mistake in the settings shows here."""

import contextlib
import functools
import json
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from greedy_distill_jax import cli, losses
from greedy_distill_jax.codecs.protocol import VideoCodec
from greedy_distill_jax.config.settings import Settings
from greedy_distill_jax.config.tree import default_text
from greedy_distill_jax.data.augment import WORDS, augmented
from greedy_distill_jax.data.loader import SkipBadRecords, latents_of
from greedy_distill_jax.data.sources.protocol import captions_of, check_example
from greedy_distill_jax.distribution import agreement
from greedy_distill_jax.distribution.parallel import on_mesh
from greedy_distill_jax.distribution.sharding import shardings, with_shardings
from greedy_distill_jax.errors import UserError
from greedy_distill_jax.runs.run import Run, architecture, data_source
from greedy_distill_jax.storage.checkpoint import has_checkpoint, load_meta
from greedy_distill_jax.text.hashed_words import HashWordEncoder
from greedy_distill_jax.text.load import load_text_encoder
from greedy_distill_jax.text.protocol import TextEncoder
from greedy_distill_jax.text.store import check_captions
from greedy_distill_jax.text.vocabulary import vocabulary
from greedy_distill_jax.training import audit
from greedy_distill_jax.training.check_mesh import check_mesh
from greedy_distill_jax.training.sources import fingerprints, frozen_runs, load_sources
from greedy_distill_jax.training.stages.base import Inputs, Part, Stage, returned
from greedy_distill_jax.training.state import TrainState
from greedy_distill_jax.weights.pipeline import load_codec


class Job(NamedTuple):
    """A run that is ready to start.

    given: parameters of the runs that networks start from. fingerprints: of the runs behind frozen networks. data: of
    what the data and the text encoder hold, by configuration key. words: of all captions that the run's network has
    seen, see ``_words``.
    """

    settings: Settings
    stage: Stage
    given: dict[str, Any]
    fingerprints: dict[str, str]
    data: dict[str, str]
    source: Any
    captions: list[str]
    words: list[str] | None
    codec: VideoCodec
    encoder: TextEncoder
    latent_shape: tuple[int, int, int, int]
    state_shape: TrainState
    state_sharding: TrainState
    frozen_sharding: Any
    batch_sharding: dict[str, NamedSharding]
    parts: tuple[Part, ...]  # of the stage, jitted

    @property
    def mesh(self) -> Mesh:
        """That everything lies on."""
        return self.batch_sharding["text"].mesh

    def meta(self, step: int, train_cpu_s: float) -> dict[str, Any]:
        """What is saved with a checkpoint, as JSON."""
        settings = self.settings
        return {
            "stage": settings.stage,
            "network": self.stage.name,
            "data_position": step * settings.data.batch,
            "config": settings.text,
            "architecture": architecture(self.stage.model),
            "train_cpu_s": train_cpu_s,
            "latent_shape": list(self.latent_shape),
            "steps": settings.steps,
            "sources": self.fingerprints,
            "data": self.data,
            "words": self.words,
        }


DATA_PLACES = {name: f"config.data.{name}" for name in ("source", "text", "augment", "max_bad_records", "frames")}


class Data(NamedTuple):
    """What a run trains on. ``examples``: the first few. ``codec``: None while none is known, as of prompts alone."""

    raw: Any  # as it was opened, with its attributes
    source: Any  # bad records are skipped
    examples: list[dict[str, Any]]
    codec: VideoCodec | None


def open_data(settings: Settings, readers: Callable[[int], Sequence[int]] | None = None) -> Data:
    """Opens the training data; UserError when it is not what the stage trains on. ``readers``: of `SkipBadRecords`."""
    raw, codec = data_source(settings, "train", frames=settings.kind.example_frames(settings), seed=settings.seed)
    settings.kind.check_source(settings, raw)
    if not len(raw):
        raise UserError(f"{settings.data.source!r} is empty; give data with at least one example", "source")
    source = SkipBadRecords(raw, settings.data.max_bad_records, readers)
    examples = [source[i] for i in range(min(4, len(source)))]
    for example in examples:
        check_example(example, settings.data.source)
    if "video" not in examples[0] and settings.data.augment != "none":
        raise UserError(
            f"config.data.augment {settings.data.augment!r} changes pixels, but {settings.data.source} holds none; set "
            f"config.data.augment=none."
        )
    return Data(raw, source, examples, codec)


def prepare_job(settings: Settings, workdir: Path, mesh: Mesh) -> Job:
    """Builds networks, data and the jitted parts, and traces the parts up to the first on the host.

    Raises:
      UserError: what is wrong with settings, data, runs or mesh.
    """
    with cli.places(**DATA_PLACES):
        data, wan = open_data(settings, agreement.readers(mesh)), settings.wan
        encoder = load_text_encoder(settings.data.text, text_len=wan.text_len, text_dim=wan.text_dim)
        held = _content(source=data.raw, text=encoder)
    stored = _stored_meta(workdir)
    resumed = stored is not None
    if resumed:
        _check_kept(settings, workdir, stored)
        _check_data(settings, workdir, held, stored)
    wanted = settings.kind.wanted(settings)
    sources = load_sources(settings, wanted, resumed=resumed, sharding=functools.partial(shardings, mesh=mesh))
    settings.kind.check_sources(settings, sources)
    codecs = {getattr(settings, wanted[name].key): run.codec for name, run in sources.items()}
    codec = _agreed_codec(settings, data.codec, codecs | ({str(workdir): load_codec(workdir)} if resumed else {}))
    with cli.places(**DATA_PLACES):
        known = [settings.data.negative_prompt, *captions_of(data.raw)]
        check_captions(encoder, known, augment=settings.data.augment)
    settings.kind.check_codec(settings, codec)
    latent_shape = _latent_shape(settings, data, codec, sources)
    frozen = {name: run.params for name, run in frozen_runs(wanted, sources).items()}
    with one_line():
        null_MC = encoder([settings.data.negative_prompt])[0]
        stage = settings.kind.build(settings, Inputs(frozen, null_MC, latent_shape, data.raw, codec))
    if not isinstance(stage, Stage):
        raise UserError(
            f"stage {settings.stage}: build() returned a {type(stage).__name__}; return a stages.base.Stage."
        )
    for warning in averages(settings, stage):
        if jax.process_index() == 0:
            print(f"warning: {warning}", file=sys.stderr)
    check_mesh(settings, mesh, latent_shape)
    batch_shape = settings.kind.batch_shapes(settings, latent_shape, data.raw)
    _check_entries(settings, data, batch_shape)
    with one_line():
        state_shape = state_shapes(stage, latent_shape)
        jitted, *placed = jit_parts(stage, mesh, state_shape, batch_shape)
        state_sharding, frozen_sharding, batch_sharding = placed
        # With the shardings they will have: jax keeps the traces for the first update, which would trace all again.
        of = map(with_shardings, (state_shape, stage.frozen, batch_shape), placed)
        for warning in trace_parts(jitted, *of):
            if jax.process_index() == 0:  # the same on all
                print(f"warning: {warning}", file=sys.stderr)
    return Job(
        settings,
        stage,
        {name: sources[name].params for name in stage.needed(sources)},
        fingerprints(wanted, sources),
        held,
        augmented(data.source, settings.data.augment, settings.seed),
        [example["caption"] for example in data.examples],
        _words(settings, encoder, data.raw, _words_before(stage, sources), stored),
        codec,
        encoder,
        latent_shape,
        state_shape,
        state_sharding,
        frozen_sharding,
        batch_sharding,
        jitted,
    )


def _words_before(stage: Stage, sources: Mapping[str, Run]) -> list[str] | None:
    """Words that the run which the trained network starts from has seen; None where they are not known."""
    origin = next((sources[name] for name in stage.networks[stage.name].start_from if name in sources), None)
    return origin.meta.get("words") if origin else []


def _words(
    settings: Settings, encoder: TextEncoder, raw: Any, before: list[str] | None, stored: Mapping[str, Any] | None
) -> list[str] | None:
    """Words of all captions that the trained network has seen; None where other words have a meaning to it, too.

    Also None where they are not known: a source that does not list its captions, a run from before they were kept (or
    one that starts from it), and more of them than a checkpoint keeps.
    """
    if stored is not None:
        return stored.get("words")
    captions = getattr(raw, "captions", None)
    if not isinstance(encoder, HashWordEncoder) or not captions or before is None:
        return None
    more = [*before, *WORDS[settings.data.augment]]
    return vocabulary([*captions, settings.data.negative_prompt], encoder.text_len, more)


def _content(**parts: Any) -> dict[str, str]:
    """{"data.NAME": fingerprint} of the parts that have one; UserError for one that is no text."""
    held = {}
    for name, part in parts.items():
        found = getattr(part, "fingerprint", None)
        if not isinstance(found, str | None):
            raise UserError(
                f"the fingerprint of {type(part).__name__} is a {type(found).__name__}; make it a text, as a property, "
                f"or None",
                name,
            )
        if found:
            held[f"data.{name}"] = found
    return held


def _stored_meta(workdir: Path) -> dict[str, Any] | None:
    """What was saved with the newest step of the folder, None without one.

    UserError for imported weights, which no training may overwrite.
    """
    if not has_checkpoint(workdir / "checkpoints"):
        return None
    meta = load_meta(workdir / "checkpoints")
    if "source" in meta:
        raise UserError(
            f"{workdir} holds imported weights, not a run; choose another workdir, and start from them with "
            f"config.teacher_from."
        )
    return meta


_REMEDY = {"data.source": "prepare it again from the same input", "data.text": "give the encoder or the store it had"}


def _check_data(settings: Settings, workdir: Path, held: Mapping[str, str], meta: Mapping[str, Any]) -> None:
    """Raises UserError when data or texts were prepared anew, with other content, since a run was started."""
    for key, old in meta.get("data", {}).items():
        if held.get(key) != old:
            value = settings.data.source if key == "data.source" else settings.data.text
            raise UserError(
                f"{workdir} was started with other content of config.{key} = {value!r} (fingerprint {old}, not "
                f"{held.get(key)}); {_REMEDY[key]}, or choose another workdir."
            )


def _check_entries(settings: Settings, data: Data, batch_shape: Mapping[str, Any]) -> None:
    """Raises UserError when the data lacks what the stage takes of a batch."""
    held = {"text"} | (data.examples[0].keys() & {"latents", "states"})
    held |= {"latents"} if "video" in data.examples[0] else set()
    missing = sorted(batch_shape.keys() - held)
    if missing:
        raise UserError(
            f"config.data.source {settings.data.source} holds no {' and no '.join(missing)}, which stage "
            f"{settings.stage} trains on; use other data."
        )


def _agreed_codec(settings: Settings, codec: VideoCodec | None, stored: Mapping[str, VideoCodec | None]) -> VideoCodec:
    """The codec of the data and of runs by folder, which are one; UserError where they differ or nothing has one."""
    for directory, other in stored.items():
        if other is not None:
            codec = _same_codec(codec, other, directory)
    if codec is None:
        raise UserError(
            f"config.data.source {settings.data.source} holds prompts alone, and no run that this one starts from "
            f"comes with a codec; start from a run that was trained on videos."
        )
    return codec


def _same_codec(codec: VideoCodec | None, stored: VideoCodec, run: str) -> VideoCodec:
    """``stored``, the codec that ``run`` was trained with; UserError when the data comes with another one."""
    if codec is None:
        return stored
    arrays = [[np.asarray(x, np.float32) for x in jax.tree.leaves(c.params)] for c in (codec, stored)]
    same = [x.shape for x in arrays[0]] == [x.shape for x in arrays[1]] and all(
        np.allclose(a, b, atol=1e-3) for a, b in zip(*arrays, strict=True)
    )
    if not same:
        raise UserError(
            f"config.data.source comes with another codec than {run} was trained with; use the same data, or train a "
            f"teacher on this one."
        )
    return stored


def _latent_shape(settings: Settings, data: Data, codec: VideoCodec, runs: Mapping[str, Run]):
    """(T, H, W, C) of an example: of the data, or where that has none of the runs that this one starts from."""
    if data.examples[0].keys() & {"video", "latents"}:
        shape = (settings.data.frames, *latents_of(data.examples[:1], codec).shape[2:])
    elif runs:
        shape = (settings.data.frames, *next(iter(runs.values())).latent_shape[1:])
    else:
        raise UserError(
            f"config.data.source {settings.data.source} holds prompts alone, so the size of the videos is not known; "
            f"start from a run, or train on videos."
        )
    if shape[-1] != settings.wan.channels:
        raise UserError(f"The codec has {shape[-1]} channels, config.model.channels is {settings.wan.channels}.")
    return shape


@contextlib.contextmanager
def one_line() -> Iterator[None]:
    """A ValueError of ours while a job is built or traced is a mistake in its config: a UserError of one line.

    What a user's own loss or stage raises passes as it is, with its traceback.
    """
    try:
        yield
    except UserError:
        raise
    except KeyError as error:
        *_, last = traceback.extract_tb(error.__traceback__)
        if Path(last.filename).parent != Path(losses.__file__).parent:
            raise
        raise UserError(f"config.losses: a loss takes {error} of the batch, which this stage does not have.") from error
    except (ValueError, ZeroDivisionError) as error:
        if _passed_through_users_code(error):
            raise
        raise UserError(f"config: {str(error).splitlines()[0] if str(error) else type(error).__name__}") from error


def _passed_through_users_code(error: BaseException) -> bool:
    """Whether a frame of the traceback is in a file that belongs to neither this package nor an installed one."""
    package = str(Path(__file__).resolve().parents[1])
    known = (
        package,
        *(sysconfig.get_paths()[name] for name in ("purelib", "platlib", "stdlib")),
        "<frozen",
        "<string>",
    )
    files = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
    return any(not file.startswith(known) for file in files)


def state_shapes(stage: Stage, latent_shape: tuple[int, int, int, int], given=None) -> TrainState:
    """The state at step 0, shapes only; ``given`` as for ``Stage.initial_params``."""
    return jax.eval_shape(
        lambda key, given: stage.state(stage.initial_params(key, latent_shape, given)), jax.random.key(0), given or {}
    )


def jit_parts(stage: Stage, mesh: Mesh, state_shape: TrainState, batch_shape: Mapping[str, Any]):
    """(the stage's parts, jitted for the mesh, shardings of state, of frozen networks, of a batch).

    What parts hand on to each other lies where the compiler leaves it.
    """
    of_state, of_frozen, of_batch = (shardings(tree, mesh) for tree in (state_shape, stage.frozen, batch_shape))
    parts = []
    for part in stage.parts:
        if part.host:
            parts.append(part)
            continue
        jitted = jax.jit(
            on_mesh(_checked(part), mesh),
            in_shardings=(of_state, of_frozen, of_batch, None),
            out_shardings=(of_state, NamedSharding(mesh, PartitionSpec()), None),
            donate_argnums=0,
        )
        parts.append(part._replace(call=jitted))
    return tuple(parts), of_state, of_frozen, of_batch


def _checked(part: Part):
    """The part's function, held to what it must return."""

    def call(*args):
        return returned(part, part.call(*args))

    return call


def trace_parts(parts: tuple[Part, ...], state, frozen, batch) -> list[str]:
    """Traces every jitted part and audits its gradients (``training.audit``).

    Returns:
      Warnings about parameters that no loss trains.

    Raises:
      UserError: a term without a gradient.
    """
    carry, warnings = {}, []
    for part in parts:
        if part.host:
            if not part.gives:
                break  # what it hands on is known only when it runs
            carry = {**carry, **part.gives}
            continue
        with audit.watching() as found:
            _, _, carry = part.call.eval_shape(state, frozen, batch, carry)
        for term in audit.idle_terms(found):
            raise UserError(
                f"{part.losses}.{term} has no gradient: it cannot train anything; remove it, or look for what stops "
                f"its gradient."
            )
        idle = audit.idle_leaves(found)
        if idle:
            more = f" and {len(idle) - 5} more" if len(idle) > 5 else ""
            warnings.append(f"part {part.name}: no loss trains {', '.join(idle[:5])}{more}")
    return warnings


def averages(settings: Settings, stage: Stage) -> list[str]:
    """Warnings about averages that are made of what was before the updates they average, for the most part."""
    warnings = []
    for name, network in stage.networks.items():
        decay, start = network.update.ema_decay, network.update.ema_start
        if decay is None or start >= settings.steps or network.target:
            continue  # none is made, or it is the parameters, or nothing is sampled from it
        part = {"": stage.parts[0], **{part.name: part for part in stage.parts}}[network.part]
        updates = sum(part.due(step) for step in range(start + 1, settings.steps + 1))
        if decay**updates > 0.5:
            warnings.append(
                f"config.ema.decay = {decay:g} averages over some {round(1 / (1 - decay))} updates, but the {name} has "
                f"{updates} after config.ema.start = {start}: {decay**updates:.0%} of its average are parameters of "
                f"that step; lower config.ema.decay, or train longer."
            )
    return warnings


def initial_state(job: Job) -> TrainState:
    """Step 0: random networks, or ones that start from other runs, made where they will live."""
    mesh = job.mesh
    given = jax.device_put(job.given, shardings(job.given, mesh))
    make = on_mesh(functools.partial(job.stage.initial_params, latent_shape=job.latent_shape), mesh)
    params = jax.jit(
        lambda key, given: make(key, given=given),
        out_shardings={name: net.params for name, net in job.state_sharding.nets.items()},
    )(jax.random.key(job.settings.seed), given)
    return jax.jit(job.stage.state, out_shardings=job.state_sharding)(params)


_KEPT = (
    "stage",
    "seed",
    *(f"data.{key}" for key in ("source", "size", "frames", "batch", "augment", "text", "negative_prompt")),
    *(f"optimizer.lora.{key}" for key in ("rank", "alpha", "targets")),
)  # keys that a resumed run must have as they were, besides those of its stage


def _check_kept(settings: Settings, workdir: Path, meta: Mapping[str, Any]) -> None:
    """Raises UserError for a key that a run must keep and that has another value now."""
    stored, given, defaults = (json.loads(text) for text in (meta["config"], settings.text, default_text()))
    for key in (*_KEPT, *settings.kind.kept):
        old, new, default = stored, given, defaults
        for part in key.split("."):
            new, default = new[part], default[part]
            old = old.get(part, default)  # a key that did not exist then
        if old != new:
            raise UserError(
                f"{workdir} was started with config.{key} = {old!r}, not {new!r}; resume with the same value or choose "
                f"another workdir."
            )


def check_resume(job: Job, workdir: Path, step: int, meta: Mapping[str, Any]) -> None:
    """Raises UserError when a checkpoint belongs to another stage, seed, data or frozen network.

    Rates and steps may change, and losses, but for those that bring a network of their own.
    """
    _check_kept(job.settings, workdir, meta)
    for key, old in meta.get("sources", {}).items():
        if job.fingerprints.get(key) != old:
            raise UserError(
                f"{workdir} was started with another network than the one now in config.{key} = "
                f"{getattr(job.settings, key)!r} (fingerprint {old}, not {job.fingerprints.get(key)}); name that run "
                f"or choose another workdir."
            )
    if meta["data_position"] != step * job.settings.data.batch:
        raise UserError(f"{workdir} step {step} stands at example {meta['data_position']}; the checkpoint is damaged.")
