"""A store of encoder rows, written: a job that can be killed, goes on, and is shared by processes."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from greedy_distill_jax.storage.record_job import RecordJob
from greedy_distill_jax.storage.records import encode_record, fingerprint
from greedy_distill_jax.text.protocol import TextEncoder
from greedy_distill_jax.text.store import STORE

_GROUP = 256  # prompts of a shard


def write_text_store(
    prompts: Sequence[str],
    directory: str | os.PathLike,
    make_encoder: Callable[[], TextEncoder],
    *,
    plan: Mapping[str, Any],
    dtype: str,
    batch: int = 8,
    share: tuple[int, int] = (0, 1),
    overwrite: bool = False,
    progress: bool = True,
) -> dict[str, Any] | None:
    """Encodes prompts into a store that `TextStore` reads; goes on where an earlier call was killed.

    Rows past the true length are not stored. The empty prompt is always among the prompts.

    Args:
      prompts: the keys of the store; each is encoded as the encoder cleans it.
      directory: folder to write.
      make_encoder: loads the encoder; called only if something is left to do.
      plan: what the rows depend on besides the prompts, see `RecordJob`; holds "text_len" and "text_dim".
      dtype: of the stored rows, "float32" or "bfloat16".
      batch: prompts per call of the encoder.
      share: (index, count) of this process.
      overwrite: replace a store.
      progress: show a bar on standard error.

    Returns:
      What dataset.json holds; None if other processes have not finished.
    """
    prompts = list(dict.fromkeys([*(prompt.strip() for prompt in prompts), ""]))
    plan = {"prompts": fingerprint(prompts), "dtype": dtype, **plan}
    job = RecordJob(directory, STORE.name, plan, items=len(prompts), group=_GROUP, overwrite=overwrite)
    pending = job.pending(share)
    encoder = make_encoder() if pending else None
    total = sum(len(job.items_of(number)) for number in pending)
    with tqdm(total=total, desc="prepare text", unit="prompt", disable=not progress) as bar:
        for number in pending:
            own = [prompts[item] for item in job.items_of(number)]
            with job.part(number) as part:
                for start in range(0, len(own), batch):
                    some = own[start : start + batch]
                    for prompt, rows in zip(some, encoder(some), strict=True):
                        length = np.flatnonzero(rows.any(1)).max(initial=-1) + 1
                        rows = rows[:length].astype(jnp.dtype(dtype))
                        part.write(STORE.name, encode_record({"rows": rows}, prompt=prompt))
                        part.notes.append(prompt)
                    bar.update(len(some))
    return job.finish(text_len=plan["text_len"], text_dim=plan["text_dim"], plan=plan, prompts=list)
