"""Weights of the video autoencoders, in and out; their names are in `vae_names`."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from greedy_distill_jax.codecs.tiles import Tiles
from greedy_distill_jax.codecs.vae import VAEConfig, WanVAE
from greedy_distill_jax.codecs.vae_codec import VAECodec
from greedy_distill_jax.codecs.vae_tiny import TinyVAE
from greedy_distill_jax.distribution.sharding import leaf_paths
from greedy_distill_jax.errors import UserError
from greedy_distill_jax.weights.architecture import nest
from greedy_distill_jax.weights.files import TensorFiles, find_entry
from greedy_distill_jax.weights.load import DTYPES
from greedy_distill_jax.weights.replacing import replacing
from greedy_distill_jax.weights.tensor_files import read_config, tensor_files
from greedy_distill_jax.weights.torch_files import import_torch, save_torch, to_torch
from greedy_distill_jax.weights.vae_names import VAE, describe, parameter_shapes, rows

_DIFFUSERS_KEYS = {
    "base_dim": "dim",
    "dim_mult": "multipliers",
    "num_res_blocks": "res_blocks",
    "z_dim": "channels",
    "temperal_downsample": "temporal",
    "latents_mean": "mean",
    "latents_std": "std",
}


def load_vae(path: str | Path, vae: VAE | None = None, *, dtype: str = "keep") -> tuple[VAE, dict]:
    """An autoencoder and its parameters, from any of the formats.

    Args:
      path: a safetensors or `.pth` file, a folder with one, or the folder of a diffusers pipeline.
      vae: what is expected; None takes a config.json of diffusers, else the sizes of Wan2.1 or of taew2_1.
      dtype: of the parameters, one of `load.DTYPES`.

    Raises:
      UserError: no such file, weights of something else, or a missing, unexpected or differently shaped tensor.
    """
    if dtype not in DTYPES:
        raise UserError(f"dtype {dtype!r} is unknown; choose from {', '.join(DTYPES)}.", "path")
    path = Path(path).expanduser()
    if not path.exists():
        raise UserError(f"{path} does not exist; name a file or a folder with the weights of a VAE.", "path")
    if (path / "vae").is_dir():
        path = path / "vae"  # a diffusers pipeline
    files = tensor_files(path)
    naming = _naming(path, files)
    if vae is None:
        vae = TinyVAE() if naming == "tiny" else WanVAE(_config(path) if naming == "diffusers" else VAEConfig())
    if isinstance(vae, TinyVAE) != (naming == "tiny"):
        raise UserError(
            f"{path} holds a {'tiny' if naming == 'tiny' else 'Wan'} VAE, expected {describe(vae)}.", "path"
        )
    table, shapes, flat = {row.ours: row for row in rows(vae)}, parameter_shapes(vae), {}
    names = {leaf: row.diffusers if naming == "diffusers" else row.original for leaf, row in table.items()}
    for leaf, shape in shapes.items():
        value = table[leaf].from_foreign(_read(path, files, names[leaf], table[leaf].foreign_shape(shape), vae))
        flat[leaf] = jnp.asarray(value if dtype == "keep" else value.astype(jnp.dtype(dtype)))
    if unexpected := sorted(set(files.entries) - set(names.values())):
        more = f" and {len(unexpected) - 1} more" if len(unexpected) > 1 else ""
        raise UserError(
            f"{path}: unexpected tensor {unexpected[0]}{more}; these are not weights of {describe(vae)}.", "path"
        )
    return vae, nest(flat)


def load_vae_codec(path: str | Path, *, dtype: str = "bfloat16", tiles: Tiles | None = None) -> VAECodec:
    """A codec of the weights at ``path``, which computes in ``dtype``; see `load_vae` and `VAECodec`."""
    vae, params = load_vae(path, dtype=dtype)
    source = str(Path(path).expanduser().resolve())
    return VAECodec(type(vae)(dataclasses.replace(vae.cfg, dtype=dtype)), params, tiles, source)


def _naming(path: Path, files: TensorFiles) -> str:
    names = files.entries
    for naming, key in (
        ("diffusers", "decoder.conv_in.weight"),
        ("original", "decoder.middle.0.residual.0.gamma"),
        ("tiny", "decoder.1.weight"),
    ):
        if key in names:
            return naming
    some = ", ".join(sorted(names)[:2]) or "none"
    raise UserError(
        f"{path}: its tensors ({some}, ...) are not those of Wan's VAE or of TAEHV; name their file.", "path"
    )


def _config(path: Path) -> VAEConfig:
    file = (path if path.is_dir() else path.parent) / "config.json"
    config = read_config(file)
    if config.get("is_residual") or config.get("patch_size") or config.get("attn_scales"):
        raise UserError(f"{file} describes another VAE (of Wan2.2, say); use the one of a Wan2.1 model.", "path")
    fields = {ours: config[key] for key, ours in _DIFFUSERS_KEYS.items() if key in config}
    try:
        return VAEConfig(**{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()})
    except (TypeError, ValueError) as error:
        raise UserError(f"{file} describes no VAE that is known ({error}); copy the right one.", "path") from error


def _read(path: Path, files: TensorFiles, name: str, wanted: tuple[int, ...], vae: VAE) -> np.ndarray:
    entry = find_entry(path, files.entries, name)
    # Some files of TAEHV keep the weights of a doubling in time where there is none; its last half is what counts.
    surplus = isinstance(vae, TinyVAE) and name.startswith("decoder.") and name.endswith(".conv.weight")
    if entry.shape != wanted and not (surplus and entry.shape == (2 * wanted[0], *wanted[1:])):
        raise UserError(
            f"{entry.file}: tensor {name} has shape {list(entry.shape)}, expected {list(wanted)} for {describe(vae)}.",
            "path",
        )
    try:
        return files.read(name, (slice(None),) * len(entry.shape))[-wanted[0] :]
    except Exception as error:
        raise UserError(f"{entry.file}: tensor {name} cannot be read ({error}).", "path") from error


def foreign_tensors(vae: VAE, params: Mapping[str, Any], naming: str) -> dict[str, np.ndarray]:
    """Name -> tensor under the "original" or the "diffusers" names.

    Raises:
      UserError: names that this autoencoder does not have.
    """
    if naming not in ("original", "diffusers") or (naming == "diffusers" and isinstance(vae, TinyVAE)):
        known = "original" if isinstance(vae, TinyVAE) else "original or diffusers"
        raise UserError(f"{describe(vae)} has no {naming!r} names; use {known}.", "path")
    leaves = dict(leaf_paths(params))
    return {getattr(row, naming): row.to_foreign(np.asarray(leaves[row.ours])) for row in rows(vae)}


def write_vae(
    vae: VAE, params: Mapping[str, Any], target: str | Path, form: str = "original", *, overwrite: bool = False
) -> None:
    """Writes the parameters in their own dtype.

    Args:
      vae, params: as `load_vae` gives them.
      target: for "original" a .pth, .pt or .safetensors file, for "diffusers" a folder.
      form: "original" or "diffusers".
      overwrite: replace the target.

    Raises:
      UserError: a target of another kind, or one that exists or cannot be written.
    """
    target, tensors = Path(target), foreign_tensors(vae, params, form)
    if form == "original" and target.suffix not in (".pth", ".pt", ".safetensors"):
        raise UserError(f"{target} is neither .pth, .pt nor .safetensors; name such a file.", "path")
    pickled = target.suffix in (".pth", ".pt")
    if pickled:
        import_torch("writing a .pth file")
    with replacing(target, overwrite=overwrite) as partial:
        if form == "diffusers":
            partial.mkdir()
            (partial / "config.json").write_text(json.dumps(diffusers_config(vae.cfg), indent=2) + "\n")
            _save(tensors, partial / "diffusion_pytorch_model.safetensors")
        elif not pickled:
            _save(tensors, partial)
        else:
            save_torch({name: to_torch(tensor) for name, tensor in tensors.items()}, partial)


def _save(tensors: dict[str, np.ndarray], file: Path) -> None:
    from safetensors.numpy import save_file

    save_file(tensors, file, metadata={"format": "pt"})
    file.chmod(0o666 & file.parent.stat().st_mode)  # the library makes it readable for the owner alone


def diffusers_config(cfg: VAEConfig) -> dict[str, Any]:
    """config.json of `AutoencoderKLWan`."""
    fields = {key: getattr(cfg, ours) for key, ours in _DIFFUSERS_KEYS.items()}
    fields = {key: list(value) if isinstance(value, tuple) else value for key, value in fields.items()}
    return {"_class_name": "AutoencoderKLWan", "attn_scales": [], "dropout": 0.0, **fields}
