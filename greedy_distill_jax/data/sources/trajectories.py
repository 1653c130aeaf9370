"""Trajectories of a teacher's ODE, from noise to data, at the noise levels of a student.

A student is started on them by regression (Yin et al. 2025, "From Slow Bidirectional to Fast Autoregressive Video
Diffusion Models", section 4.2): from a noisy state of the teacher's way it predicts where that way ends.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32
from tqdm import tqdm

from greedy_distill_jax import ranges
from greedy_distill_jax.codecs.protocol import VideoCodec
from greedy_distill_jax.data.sources.protocol import check_held
from greedy_distill_jax.errors import UserError
from greedy_distill_jax.ranges import Count
from greedy_distill_jax.storage.record_job import RecordJob
from greedy_distill_jax.storage.records import encode_record, fingerprint
from greedy_distill_jax.storage.sharded import RecordKind, ShardedSource
from greedy_distill_jax.text.protocol import TextEncoder
from greedy_distill_jax.weights.pipeline import load_codec, save_codec

_SPLIT = "train"

Follow = Callable[
    [Float32[Array, "B T h w C"], Float32[Array, "B M D"]],
    tuple[Float[Array, "B T h w C"], Float[Array, "K B T h w C"]],
]


def _example(record: dict[str, Any], info: Mapping[str, Any]) -> dict[str, Any]:
    states, rows = record["states"].astype(np.float32), record["text"]
    if states.shape != (len(info["sigmas"]) + 1, *info["latent_shape"]):
        raise ValueError(f"states of shape {states.shape}")
    text = np.zeros(info["text_shape"], np.float32)
    text[: len(rows)] = rows
    return {"states": states[:-1], "latents": states[-1], "text": text, "caption": str(record["prompt"])}


# {"states": float32 [K, T, h, w, C] at the source's `levels`, the first of them the noise; "latents": [T, h, w, C],
# where the way ends; "text": [M, D]; "caption": str}
TRAJECTORIES = RecordKind("ode", "ode", (_SPLIT,), _example, ("latent_shape",))


def write_trajectories(
    prompts: Sequence[str],
    directory: str | os.PathLike,
    follow: Follow,
    encoder: TextEncoder,
    codec: VideoCodec,
    *,
    sigmas: tuple[float, ...],
    latent_shape: tuple[int, int, int, int],
    plan: Mapping[str, Any],
    per_prompt: int = 1,
    seed: int = 0,
    batch: int = 1,
    group: int = 16,
    dtype: str = "float32",
    share: tuple[int, int] = (0, 1),
    overwrite: bool = False,
    progress: bool = True,
) -> dict[str, Any] | None:
    """Follows the teacher's ODE from fresh noise for every prompt; goes on where an earlier call was killed.

    The noise of a trajectory depends on the seed and on its number alone, not on processes, batches or interruptions.

    Args:
      prompts: conditions.
      directory: folder to write.
      follow: (noise [B, T, h, w, C], text rows [B, M, D]) -> (clean end [B, ...], states [K, B, ...] at ``sigmas``).
      encoder: of the prompts.
      codec: of the latents; the folder keeps it, or where it lies.
      sigmas: the student's noise levels, decreasing from 1.
      latent_shape: (T, h, w, C).
      plan: what the trajectories depend on besides the prompts, see `RecordJob`.
      per_prompt: trajectories of each prompt.
      seed: of the noise.
      batch: trajectories followed together.
      group: trajectories of a shard; a kill costs each process at most the work on one shard.
      dtype: of the stored states, "float32" or "bfloat16".
      share: (index, count) of this process.
      overwrite: replace a folder made before.
      progress: show a bar on standard error.

    Returns:
      What dataset.json holds; None if other processes have not finished.
    """
    for field, value in (("per_prompt", per_prompt), ("batch", batch)):
        ranges.check(value, Count, field)
    if sigmas[0] != 1.0:
        raise UserError(
            f"the student's noise levels begin at {sigmas[0]:g}; a trajectory begins with noise, at 1", "sigmas"
        )
    plan = {
        "prompts": fingerprint(prompts),
        "per_prompt": per_prompt,
        "seed": seed,
        "sigmas": sigmas,
        "latent_shape": latent_shape,
        "dtype": dtype,
        **plan,
    }
    items = len(prompts) * per_prompt
    job = RecordJob(directory, TRAJECTORIES.name, plan, items=items, group=group, overwrite=overwrite)
    save_codec(codec, job.directory)
    pending = job.pending(share)
    key = jax.random.key(seed)
    draw = jax.jit(jax.vmap(lambda item: jax.random.normal(jax.random.fold_in(key, item), latent_shape, jnp.float32)))
    total = sum(len(job.items_of(number)) for number in pending)
    with tqdm(total=total, desc="prepare ode", unit="video", disable=not progress) as bar:
        for number in pending:
            own = job.items_of(number)
            with job.part(number) as part:
                for first in range(own.start, own.stop, batch):
                    items = range(first, min(first + batch, own.stop))
                    # One shape for every call, or the last batch would be compiled anew.
                    padded = [*items, *[items[-1]] * (batch - len(items))]
                    named = [prompts[item // per_prompt] for item in padded]
                    text = encoder(named)
                    end, states = follow(draw(jnp.asarray(padded, jnp.uint32)), jnp.asarray(text))
                    path = np.concatenate([np.asarray(states), np.asarray(end)[None]]).astype(jnp.dtype(dtype))
                    if not np.isfinite(path.astype(np.float32)).all():
                        raise UserError(f"the teacher's video of {named[0]!r} is not finite; check its weights")
                    for i, prompt in enumerate(named[: len(items)]):
                        length = np.flatnonzero(text[i].any(1)).max(initial=-1) + 1
                        arrays = {"states": path[:, i], "text": text[i, :length]}
                        part.write(_SPLIT, encode_record(arrays, prompt=prompt, item=items[i]))
                    bar.update(len(items))
    return job.finish(
        sigmas=sigmas, latent_shape=latent_shape, text_shape=(encoder.text_len, encoder.text_dim), plan=plan
    )


def open_trajectories(
    directory: str, *, split: str, size: int | None, frames: int | None, seed: int
) -> tuple[ShardedSource, VideoCodec]:
    """Opens a folder written by `write_trajectories` and the codec of its teacher; see `registry.load_source`.

    ``size`` and ``frames`` are those of the latents.
    """
    source = ShardedSource(directory, TRAJECTORIES, split)
    shape = source.info["latent_shape"]
    check_held(source, {"frames": shape[:1], "size": shape[1:3]}, frames=frames, size=size)
    return source, load_codec(source.directory)
