"""Trajectories of a teacher's ODE, from noise to data, at the noise levels of a student (METHOD_SPEC C.1).

Written by `write_trajectories`, read by `Trajectories`; a student is started on them by regression.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, SupportsIndex

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from greedy_distill_jax.errors import UserError
from greedy_distill_jax.storage.records import (
    RecordJob,
    decode_record,
    encode_record,
    fingerprint,
    first_line,
    open_shards,
    read_dataset,
)
from greedy_distill_jax.text.encoders import TextEncoder

ODE = "ode"  # kind of a folder, see `records`
_REMEDY = "make it with python -m greedy_distill_jax.prepare ode"
_SPLIT = "train"


class Trajectories:
    """Random-access source of trajectories; picklable.

    index -> {"noise": float32 [T, h, w, C], "states": [K, T, h, w, C] at `sigmas` (the first is the noise), "latents":
    [T, h, w, C] the clean end, "text": [M, D], "caption": str}.

    Attributes:
      directory: the folder.
      info: the content of dataset.json.
      sigmas: the K noise levels, decreasing from 1, without the closing 0.
      latent_shape: (T, h, w, C).
      text_shape: (M, D).
    """

    def __init__(self, directory: str | os.PathLike) -> None:
        """Opens the folder; UserError when it is missing, not finished or damaged."""
        self.directory = Path(directory).expanduser()
        self.info = read_dataset(self.directory, ODE, _REMEDY)
        self.sigmas = tuple(self.info["sigmas"])
        self.latent_shape, self.text_shape = tuple(self.info["latent_shape"]), tuple(self.info["text_shape"])
        self._shards = open_shards(self.directory, self.info, _SPLIT, _REMEDY)

    def __len__(self) -> int:
        return len(self._shards)

    def __repr__(self) -> str:
        return f"Trajectories({os.fspath(self.directory)!r})"

    def __getitem__(self, index: SupportsIndex) -> dict[str, Any]:
        """One trajectory; UserError naming the file and the index when the record is damaged."""
        shard, position = self._shards.locate(index)
        try:
            record = decode_record(self._shards[index])
            states, rows = record["states"].astype(np.float32), record["text"]
            if states.shape != (len(self.sigmas) + 1, *self.latent_shape):
                raise ValueError(f"states of shape {states.shape}")
            text = np.zeros(self.text_shape, np.float32)
            text[: len(rows)] = rows
        except (ValueError, KeyError, TypeError, RuntimeError, OSError) as error:
            raise UserError(
                f"ode: record {position} of {self._shards.paths[shard]} (index {index}) is damaged: "
                f"{first_line(error)}; make the trajectories again"
            ) from error
        return {
            "noise": states[0], "states": states[:-1], "latents": states[-1], "text": text,
            "caption": str(record["prompt"]),
        }  # fmt: skip


def write_trajectories(
    prompts: Sequence[str],
    output: str | os.PathLike,
    follow: Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]],
    encoder: TextEncoder,
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
      output: folder to write.
      follow: (noise [B, T, h, w, C], text rows [B, M, D]) -> (clean end [B, ...], states [K, B, ...] at ``sigmas``).
      encoder: of the prompts.
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
    if sigmas[0] != 1.0:
        raise UserError(f"ode: the student's noise levels begin at {sigmas[0]:g}; a trajectory begins with noise, at 1")
    plan = {
        "prompts": fingerprint(prompts), "per_prompt": per_prompt, "seed": seed, "sigmas": sigmas,
        "latent_shape": latent_shape, "dtype": dtype, **plan,
    }  # fmt: skip
    job = RecordJob(output, ODE, plan, items=len(prompts) * per_prompt, group=group, overwrite=overwrite)
    pending = job.pending(*share)
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
                        raise UserError(f"ode: the teacher's video of {named[0]!r} is not finite; check its weights")
                    for i, prompt in enumerate(named[: len(items)]):
                        length = np.flatnonzero(text[i].any(1)).max(initial=-1) + 1
                        arrays = {"states": path[:, i], "text": text[i, :length]}
                        part.write(_SPLIT, encode_record(arrays, prompt=prompt, item=items[i]))
                    bar.update(len(items))
    return job.finish(
        sigmas=sigmas, latent_shape=latent_shape, text_shape=(encoder.text_len, encoder.text_dim), plan=plan
    )
