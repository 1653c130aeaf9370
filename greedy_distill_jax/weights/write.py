"""The other formats written: safetensors in shards, `.pt`, and the folder with the PyTorch student.

Everything appears whole or not at all (see `replacing`).
"""

import ast
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from greedy_distill_jax.errors import UserError
from greedy_distill_jax.models.students.config import CausalConfig, StudentConfig
from greedy_distill_jax.weights import names
from greedy_distill_jax.weights.architecture import architecture_json, wan_of
from greedy_distill_jax.weights.files import PARTS
from greedy_distill_jax.weights.kind import causal_json
from greedy_distill_jax.weights.load import stored_dtype
from greedy_distill_jax.weights.replacing import replacing
from greedy_distill_jax.weights.source import METADATA, STUDENT_FORMAT, TEXT, Source
from greedy_distill_jax.weights.torch_files import import_torch, save_torch, to_torch

WRITABLE = ("original", "diffusers", "causal-pt", "torch-student")
SHARD_BYTES = 5 * 10**9
NETWORKS_FILE, STUDENT_FILE = "torch_networks.py", "torch_student.py"
_NETWORKS = "greedy_distill_jax.weights.torch_networks"


def tensors_of(source: Source, naming: str, dtype: str) -> Iterator[tuple[str, np.ndarray]]:
    """(foreign name, tensor), leaf by leaf: no more than one leaf of ours is in memory.

    Raises:
      UserError: a parameter that has no name there (a student's, in Wan's formats).
    """
    for path, shape in source.shapes.items():
        whole = (slice(None),) * len(names.layer_shape(path, shape))
        wanted = stored_dtype(source, path, dtype)
        for layer, name in enumerate(names.foreign_names(path, shape, naming)):
            value = np.asarray(source.read_layer(path, layer, whole), wanted)
            yield name, names.to_foreign(path, value, patch=wan_of(source.cfg).patch)


def write(
    source: Source,
    target: str | os.PathLike,
    form: str,
    *,
    dtype: str = "keep",
    shard_bytes: int = SHARD_BYTES,
    student: Mapping[str, Any] | None = None,
    codec: Path | None = None,
    overwrite: bool = False,
) -> None:
    """Writes a source in another format.

    Args:
      source: from `open_source`.
      target: a folder; for "causal-pt" a file.
      form: one of `WRITABLE`.
      dtype: of the written tensors, "keep" or a name.
      shard_bytes: largest safetensors file; more than one get an index.json.
      student: for "torch-student": "plan" and "latent_shape" for config.json.
      codec: of a run, copied into the folder.
      overwrite: replace the target.

    Raises:
      UserError: a student in a format of Wan's or the other way round, or a place that cannot be written.
    """
    is_student = isinstance(source.cfg, StudentConfig)
    if form not in WRITABLE:
        raise UserError(f"format {form!r} is unknown; choose from {', '.join(WRITABLE)}.", "form")
    if shard_bytes < 1:
        raise UserError(f"shards of {shard_bytes} bytes; give a positive size.", "shard_bytes")
    if is_student != (form == "torch-student"):
        fits = "torch-student" if is_student else "original, diffusers or causal-pt"
        holds = "ETM + SDD" if is_student else "a Wan DiT"
        raise UserError(f"{source.path} holds {holds}, which format {form} cannot; use {fits}.", "form")
    stored_dtype(source, next(iter(source.shapes)), dtype)
    if form == "causal-pt" and Path(target).suffix not in (".pt", ".pth"):
        raise UserError(f"{target} is no .pt file; name the output such as {target}.pt", "target")
    with replacing(target, overwrite=overwrite) as partial:
        if form == "causal-pt":
            _write_pt(source, partial, dtype)
            return
        partial.mkdir()
        stem = "model" if is_student else "diffusion_pytorch_model"
        naming = "diffusers" if form == "diffusers" else "original"
        _write_safetensors(source, partial, stem, naming, dtype, shard_bytes)
        config = _student_config(source, dict(student or {})) if is_student else _wan_config(source, form)
        (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        if is_student:
            (partial / STUDENT_FILE).write_text(student_file(), encoding="utf-8")
        if codec is not None:
            shutil.copyfile(codec, partial / codec.name)


def student_file() -> str:
    """The PyTorch student in one file, `torch_networks` in front of `torch_student`, that imports nothing of ours."""
    sources = [Path(__file__).with_name(name).read_text(encoding="utf-8") for name in (NETWORKS_FILE, STUDENT_FILE)]
    imports, bodies = set(), []
    for source in sources:
        doc, *body = ast.parse(source).body
        found = [node for node in body if isinstance(node, ast.Import | ast.ImportFrom)]
        imports |= {ast.unparse(node) for node in found if getattr(node, "module", "") != _NETWORKS}
        bodies.append("".join(source.splitlines(keepends=True)[found[-1].end_lineno :]).strip("\n"))
    header = "".join(source.splitlines(keepends=True)[: doc.end_lineno])
    library = {line for line in imports if re.match(r"\w+ (\w+)", line)[1] in sys.stdlib_module_names}
    groups = ("\n".join(sorted(lines, key=lambda x: (x[0] == "f", x))) for lines in (library, imports - library))
    return "\n".join([header, *(f"{group}\n" for group in groups), "\n\n\n".join(bodies), ""])


def _write_safetensors(source: Source, folder: Path, stem: str, naming: str, dtype: str, shard_bytes: int) -> None:
    from safetensors.numpy import save_file

    metadata = {"format": "pt", **_of_itself(source)}
    shards, shard, size, total = [], {}, 0, 0  # names per written shard; the one being filled

    def flush():
        nonlocal shard, size
        file = folder / f"shard-{len(shards)}"
        save_file(shard, file, metadata=metadata)
        file.chmod(folder.stat().st_mode & 0o666)  # the library makes it readable for the owner alone
        shards.append((file, list(shard)))
        shard, size = {}, 0

    for name, tensor in tensors_of(source, naming, dtype):
        if shard and size + tensor.nbytes > shard_bytes:
            flush()
        shard[name] = tensor
        size, total = size + tensor.nbytes, total + tensor.nbytes
    flush()
    weight_map = {}
    for number, (file, written) in enumerate(shards, 1):
        part = f"-{number:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
        final = f"{stem}{part}.safetensors"
        file.rename(folder / final)
        weight_map.update(dict.fromkeys(written, final))
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_pt(source: Source, file: Path, dtype: str) -> None:
    import_torch("writing a .pt file")  # before the tensors are read
    part = source.meta.get("part") or source.meta.get("source", {}).get("part") or PARTS[0]
    state = {f"model.{name}": to_torch(tensor) for name, tensor in tensors_of(source, "original", dtype)}
    save_torch({part: state, **_of_itself(source)}, file)


def _of_itself(source: Source) -> dict[str, str]:
    """What a file of ours says of the model in it."""
    text = source.meta.get("text")
    return {METADATA: json.dumps(architecture_json(source.cfg)), **({TEXT: text} if text else {})}


def _wan_config(source: Source, form: str) -> dict[str, Any]:
    """config.json as Wan's repository and diffusers write it."""
    cfg = wan_of(source.cfg)
    if form == "original":
        causal = isinstance(source.cfg, CausalConfig)
        return dict(
            _class_name="CausalWanModel" if causal else "WanModel",
            model_type="t2v",
            dim=cfg.dim,
            ffn_dim=cfg.ffn_dim,
            freq_dim=cfg.freq_dim,
            num_heads=cfg.num_heads,
            num_layers=cfg.num_layers,
            in_dim=cfg.channels,
            out_dim=cfg.channels,
            text_len=cfg.text_len,
            eps=cfg.eps,
            **(causal_json(source.cfg) if causal else {}),
        )
    return dict(
        _class_name="WanTransformer3DModel",
        patch_size=[1, cfg.patch, cfg.patch],
        num_attention_heads=cfg.num_heads,
        attention_head_dim=cfg.head_dim,
        in_channels=cfg.channels,
        out_channels=cfg.channels,
        text_dim=cfg.text_dim,
        freq_dim=cfg.freq_dim,
        ffn_dim=cfg.ffn_dim,
        num_layers=cfg.num_layers,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        eps=cfg.eps,
        image_dim=None,
        added_kv_proj_dim=None,
        rope_max_seq_len=1024,
    )


def _student_config(source: Source, student: dict[str, Any]) -> dict[str, Any]:
    known = {k: source.meta[k] for k in ("plan", "latent_shape") if k in source.meta}
    return {"format": STUDENT_FORMAT, "architecture": architecture_json(source.cfg), **known, **student}
