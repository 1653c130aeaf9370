"""The two parts of a student's gradient: through what it denoises, and through the context that it writes.

A student's network runs over noisy tokens, which it denoises, and over finished ones, whose keys and values later
chunks look back on. Both passes are given parameters of their own (``context_weights`` "own", copied where a run shares
them), and one gradient with respect to all of them has the two parts apart; on shared weights their sum is the gradient
of training with ``distill.context_grad_sdd`` "params". A negative cosine between them means that what one pass needs of
a weight the other undoes.

References:
  Self Gradient Forcing, 2026, arXiv 2607.20368 (parameters learn through the context).
  SGF+, 2026, arXiv 2610.10429 (the two parts partly cancel on shared weights).
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from greedy_distill_jax import ranges
from greedy_distill_jax.data.loader import collate
from greedy_distill_jax.diffusion.step_plan import StepPlan
from greedy_distill_jax.distribution.compile_cache import use_compile_cache
from greedy_distill_jax.distribution.sharding import leaf_paths
from greedy_distill_jax.errors import UserError
from greedy_distill_jax.eval.gradient_pages import draw_cosines, markdown
from greedy_distill_jax.eval.report import write_all
from greedy_distill_jax.losses.flow_matching import flow_matching
from greedy_distill_jax.measure.environment import environment
from greedy_distill_jax.models.students.base import StreamingModel
from greedy_distill_jax.models.students.config import StudentConfig
from greedy_distill_jax.models.students.make import make_student
from greedy_distill_jax.ranges import Count, Seed
from greedy_distill_jax.runs.run import Run, data_source
from greedy_distill_jax.storage.disk import check_writable
from greedy_distill_jax.training import nets

LOSS = (
    "squared error of x0 (flow matching with weighting x0), teacher-forced on held-out videos, of which no run is "
    "trained; noise levels as config.shift spaces them; the same loss for runs of every stage"
)
MODULES = ("self_attn", "cross_attn", "ffn", "modulation")  # of a layer
EMBEDDINGS = "embeddings"  # in front of the layers; the head has no part in the context and is left out


class Parts(NamedTuple):
    """A loss and its gradient, apart: trees of the network's parameters, ``context`` without the head.

    ``etm``: that of ETM, which writes context with weights of its own; None of a causal student.
    """

    loss: Float[Array, ""]
    denoise: Any
    context: Any
    etm: Any = None


def apart(model: StreamingModel, params: Any) -> tuple[StreamingModel, Any]:
    """Returns the student whose context pass has parameters of its own, and its parameters, copied where shared.

    Its keys must come from a pass over the context, not from denoising calls (context "last_step_kv").
    """
    # The numbers of "fused" are those of "clean".
    own = make_student(dataclasses.replace(model.cfg, context="clean", context_weights="own"))
    return own, own.with_context(params)


def held_out_loss(
    model: StreamingModel,
    params: Any,
    batch: Mapping[str, Float[Array, "B ..."]],
    key: PRNGKeyArray,
    *,
    plan: StepPlan,
    shift: float,
    context_noise: float = 0.0,
) -> Float[Array, ""]:
    """Returns the loss ``LOSS`` of a batch.

    Args:
      model, params: any student.
      batch: "latents" [B, T, H, W, C] and "text" [B, M, D].
      key: of noise levels and noise.
      plan, context_noise: of the history, see ``nets.look_back``.
      shift: of the noise levels.
    """
    key_history, key_loss = jax.random.split(key)
    batch = nets.look_back(model, batch, key_history, plan=plan, context_noise=context_noise)
    options = dict(shift=shift, per_frame=True, group=model.cfg.chunk, weighting="x0")
    return jnp.mean(flow_matching(nets.student_net(model, params), batch, key_loss, **options)[0])


def gradient_parts(
    model: StreamingModel, params: Any, batch: Mapping[str, Float[Array, "B ..."]], key: PRNGKeyArray, **options: Any
) -> Parts:
    """Returns ``held_out_loss``, whose arguments these are, and the parts of its gradient.

    Args:
      model, params: of ``apart``.
      batch, key, **options: as there.
    """
    loss, grads = jax.value_and_grad(lambda p: held_out_loss(model, p, batch, key, **options))(params)
    if isinstance(model.cfg, StudentConfig):
        return Parts(loss, grads["sdd"], grads["sdd_context"], grads["etm"])
    return Parts(loss, grads["dit"], grads["dit_context"])


def products(denoise: Any, context: Any) -> dict[str, Float[Array, "layers 3"]]:
    """Returns (|denoise|^2, |context|^2, denoise . context) of every layer, by module; embeddings are one layer.

    The norm in front of the cross-attention and its gate of z count as cross-attention.
    """
    found: dict[str, Any] = {}
    of_denoise = dict(leaf_paths(denoise))
    for path, y in leaf_paths(context):
        x, (top, *below) = of_denoise[path], path.split("/")
        module = EMBEDDINGS
        if top == "blocks":
            module = "cross_attn" if below[0] in ("norm3", "z_gate") else below[0]
        rows = len(y) if top == "blocks" else 1
        x, y = (leaf.astype(jnp.float32).reshape(rows, -1) for leaf in (x, y))
        sums = jnp.stack([jnp.sum(a * b, axis=1) for a, b in ((x, x), (y, y), (x, y))], axis=1)
        found[module] = found[module] + sums if module in found else sums
    return found


def measure(run: Run, *, videos: int, batches: int, seed: int) -> dict[str, Any]:
    """Returns the figures of a run: norms and cosines, their means over batches and the standard errors of these.

    Args:
      run: of a student.
      videos: held-out videos, over all batches; fewer where the data have fewer.
      batches: as many gradients, each of videos of its own.
      seed: of the data and the noise.

    Raises:
      UserError: a student without a pass over its context, or data without enough held-out videos.
    """
    model, params = apart(run.model, run.params)
    examples = _held_out(run, videos, batches, seed)
    s = run.settings
    parts = functools.partial(gradient_parts, model, plan=s.plan, shift=s.shift, context_noise=s.student.context_noise)

    @jax.jit
    def one(params, batch, key):
        found = parts(params, batch, key)
        etm = {} if found.etm is None else products(found.etm, found.etm)
        return found.loss, products(found.denoise, found.context), etm

    drawn, size = [], len(examples) // batches
    for i, key in enumerate(jax.random.split(jax.random.key(seed), batches)):
        batch = collate(examples[i * size : (i + 1) * size], run.codec, run.encoder)
        batch = {name: jnp.asarray(batch[name]) for name in ("latents", "text")}
        drawn.append(jax.tree.map(np.asarray, one(params, batch, key)))
    losses, of_network, of_etm = (jax.tree.map(lambda *x: np.stack(x), *column) for column in zip(*drawn, strict=True))
    blocks = model.cfg.sdd_layers if isinstance(model.cfg, StudentConfig) else range(model.cfg.base.num_layers)
    return {
        "kind": s.student.kind,
        "stage": s.stage,
        "context_weights": run.model.cfg.context_weights,
        "data": s.data.source,
        "videos": size * batches,
        "batches": batches,
        "seed": seed,
        "loss": _mean("value", losses),
        "whole": _figures(sum(x.sum(axis=1) for x in of_network.values())),
        "modules": {name: _figures(of_network[name].sum(axis=1)) for name in (*MODULES, EMBEDDINGS)},
        "layers": [
            {
                "block": block,  # of the teacher, which the layer started from
                "all": _figures(sum(of_network[name][:, layer] for name in MODULES)),
                **{name: _figures(of_network[name][:, layer]) for name in MODULES},
            }
            for layer, block in enumerate(blocks)
        ],
        "etm": _mean("norm", np.sqrt(sum(x.sum(axis=1) for x in of_etm.values())[:, 0])) if of_etm else None,
    }


def _held_out(run: Run, videos: int, batches: int, seed: int) -> list[dict[str, Any]]:
    ranges.check(videos, Count, "videos")
    ranges.check(batches, Annotated[int, ranges.at_least(2)], "batches")  # one has no standard error
    ranges.check(seed, Seed, "seed")
    data = run.settings.data
    source, _ = data_source(run.settings, "held_out", frames=data.frames, seed=seed)
    count = min(videos, len(source)) // batches * batches
    if not count:
        raise UserError(
            f"{videos} videos, of which {data.source} has {len(source)} held out, do not fill {batches} batches; give "
            f"more videos or fewer batches",
            "videos",
        )
    examples = [source[i] for i in range(count)]
    if not examples[0].keys() & {"video", "latents"}:
        raise UserError(f"{data.source}, which the run was trained on, holds no videos to measure with", "directory")
    return examples


def _mean(name: str, values: Float[np.ndarray, " batches"]) -> dict[str, float | None]:
    """{name: mean over batches, name_error: its standard error}; None where a batch has no value."""
    if not np.isfinite(values).all():
        return {name: None, f"{name}_error": None}
    return {name: float(np.mean(values)), f"{name}_error": float(np.std(values, ddof=1) / np.sqrt(len(values)))}


def _figures(sums: Float[np.ndarray, "batches 3"]) -> dict[str, float | None]:
    """Norms of both parts and the cosine between them, which is None where one of them is zero."""
    denoise, context, product = np.asarray(sums, np.float64).T
    both = np.sqrt(denoise * context)
    cosine = np.divide(product, both, out=np.full_like(both, np.nan), where=both > 0)
    return _mean("denoise", np.sqrt(denoise)) | _mean("context", np.sqrt(context)) | _mean("cosine", cosine)


def analyze_gradients(
    directories: Sequence[str | Path],
    output: str | Path,
    *,
    videos: int = 64,
    batches: int = 8,
    seed: int = 1000,
    announce: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Measures runs, writes gradients.json, gradients.md and gradients.png, and returns what the first holds.

    Args:
      directories: of students' runs; lines of the plot have the names of the folders.
      output: folder of the files.
      videos, batches, seed: as for ``measure``, the same for every run.
      announce: is told what is being done.

    Raises:
      UserError: with the name of the argument that is wrong as its field ("directory": one of the runs).
    """
    paths = [Path(directory).expanduser() for directory in directories]
    if len({path.resolve() for path in paths}) < len(paths):
        raise UserError("a run is given twice; give each once", "directory")
    runs = {path: Run.load(path) for path in paths}
    for path, run in runs.items():
        if not run.is_student:
            raise UserError(f"{path} holds a teacher, which writes no context; give the run of a student", "directory")
        if run.model.cfg.context == "last_step_kv":
            raise UserError(
                f"{path} holds a student of context 'last_step_kv', whose keys are those of denoising calls: there is "
                f"no pass over the context to tell apart; give a student of context 'clean' or 'fused'",
                "directory",
            )
    folder, found = Path(output).expanduser(), {}
    check_writable(folder, "output")  # before it is measured
    names = [path.name for path in paths]
    for path, run in runs.items():
        name = path.name if names.count(path.name) == 1 else str(path)
        use_compile_cache(run.settings.compile_cache)
        announce(f"analyze: gradients of {name}")
        found[name] = measure(run, videos=videos, batches=batches, seed=seed)
    result = {"loss": LOSS, "runs": found, **environment()}
    contents = {"json": (json.dumps(result, indent=2) + "\n").encode(), "md": markdown(result).encode()}
    contents["png"] = draw_cosines(found)
    write_all(folder, {f"gradients.{kind}": content for kind, content in contents.items()}, "the gradients")
    announce(f"analyze: {folder / 'gradients.json'}")
    return result
