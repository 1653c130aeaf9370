"""A run trained with LoRA as an adapter: its factors under the names that PEFT and diffusers read."""

import json
import os
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np

from greedy_distill_jax.config.keys import Lora
from greedy_distill_jax.errors import UserError
from greedy_distill_jax.models.students.config import StudentConfig
from greedy_distill_jax.weights import names
from greedy_distill_jax.weights.load import DTYPES
from greedy_distill_jax.weights.replacing import replacing
from greedy_distill_jax.weights.source import OurSource, Source

ADAPTERS = ("peft", "diffusers-lora")
PEFT_FILES = ("adapter_model.safetensors", "adapter_config.json")
DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"


def write_adapter(
    source: Source, target: str | os.PathLike, form: str, *, dtype: str = "keep", overwrite: bool = False
) -> None:
    """Writes the factors of a run's last update, which no average is made of.

    Base weights are those of the run that it started from: there a linear's weight is W, here W + scale B A.

    Args:
      source: a training run, from `open_source`.
      target: a folder.
      form: "peft" (Wan's own names, or those of an exported student, and an adapter_config.json), or "diffusers-lora"
        (names of `WanTransformer3DModel`; the scale is in B, because there it is alpha / rank = 1 for most readers).
      dtype: of the written tensors, "keep" or a name.
      overwrite: replace the target.

    Raises:
      UserError: not a run, one that was not trained with LoRA, a student for diffusers, or a place that cannot be
        written.
    """
    from safetensors.numpy import save_file

    if dtype not in DTYPES:
        raise UserError(f"dtype {dtype!r} is unknown; choose from {', '.join(DTYPES)}.", "dtype")
    if form == "diffusers-lora" and isinstance(source.cfg, StudentConfig):
        raise UserError(f"{source.path} holds ETM + SDD, which diffusers does not know; use peft.", "form")
    lora = _lora_of(source)
    tensors, modules = {}, set()
    for layer, module, a, b in _factors(source, "diffusers" if form == "diffusers-lora" else "original"):
        prefix, b = ("base_model.model", b) if form == "peft" else ("transformer", lora.scale * b)
        for name, value in (("lora_A", a), ("lora_B", b)):
            wanted = value.dtype if dtype == "keep" else jnp.dtype(dtype)
            tensors[f"{prefix}.{module}.{name}.weight"] = np.ascontiguousarray(value.T, wanted)
        modules.add(names.split_path(f"{layer}/kernel")[1].original.removeprefix("blocks.{}.").removesuffix(".weight"))
    with replacing(target, overwrite=overwrite) as partial:
        partial.mkdir()
        if form == "peft":
            config = json.dumps(_peft_config(lora, sorted(modules)), indent=2)
            (partial / PEFT_FILES[1]).write_text(config + "\n", encoding="utf-8")
        file = partial / (PEFT_FILES[0] if form == "peft" else DIFFUSERS_FILE)
        save_file(tensors, file, metadata={"format": "pt"})
        file.chmod(partial.stat().st_mode & 0o666)  # the library makes it readable for the owner alone


def _lora_of(source: Source) -> Lora:
    """The keys that a run was trained with; UserError for a source that has no factors."""
    stored = json.loads(source.meta["config"]) if isinstance(source, OurSource) else {}
    lora = Lora(**stored.get("optimizer", {}).get("lora", {}))  # a run of before there was LoRA has no such keys
    if not lora.rank:
        raise UserError(
            f"{source.path} was not trained with LoRA, so there is no adapter; name a run with "
            f"config.optimizer.lora.rank above 0, or export its weights.",
            "path",
        )
    return lora


def _factors(source: OurSource, naming: str) -> Iterator[tuple[str, str, np.ndarray, np.ndarray]]:
    """(path of the linear, name of the module, A [in, rank], B [rank, out]) of every layer."""
    stored = source.factors()
    for layer in sorted(path.rpartition("/")[0] for path in stored if path.endswith("/lora_A")):
        a, b = stored[f"{layer}/lora_A"], stored[f"{layer}/lora_B"]
        for i, name in enumerate(names.foreign_names(f"{layer}/kernel", a.shape, naming)):
            yield layer, name.removesuffix(".weight"), a[i], b[i]


def _peft_config(lora: Lora, modules: list[str]) -> dict[str, Any]:
    """adapter_config.json as PEFT writes it; what it does not say is PEFT's default."""
    return dict(
        peft_type="LORA",
        task_type=None,
        base_model_name_or_path=None,
        inference_mode=True,
        r=lora.rank,
        lora_alpha=lora.rank if lora.alpha is None else lora.alpha,
        lora_dropout=0.0,
        bias="none",
        target_modules=modules,
    )
