"""Weights of the video autoencoders, in and out: Wan2.1_VAE.pth, diffusers' `AutoencoderKLWan`, TAEHV's taew2_1.pth.

One table per autoencoder; everything is a rename, a transposition ([..., I, O] against [O, I, ...]) and axes of length
one, so nothing is lost or rounded. Original and diffusers names differ by renaming alone.
"""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from greedy_distill_jax.codecs.vae import VAEConfig, WanVAE
from greedy_distill_jax.codecs.vae_codec import Tiles, VAECodec
from greedy_distill_jax.codecs.vae_tiny import TinyVAE, TinyVAEConfig
from greedy_distill_jax.distribution.sharding import leaf_paths
from greedy_distill_jax.errors import UserError
from greedy_distill_jax.weights.files import TensorFiles, import_torch, to_torch
from greedy_distill_jax.weights.load import DTYPES
from greedy_distill_jax.weights.source import nest, read_config, tensor_files
from greedy_distill_jax.weights.write import replacing

VAE = WanVAE | TinyVAE
_DIFFUSERS_KEYS = {"base_dim": "dim", "dim_mult": "multipliers", "num_res_blocks": "res_blocks", "z_dim": "channels",
                   "temperal_downsample": "temporal", "latents_mean": "mean", "latents_std": "std"}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Row:
    """One parameter.

    Attributes:
      ours: path of the leaf.
      original: name in Wan's (or TAEHV's) own file.
      diffusers: name in `AutoencoderKLWan`; "" where there is none.
      ones: axes of length one at the end of the foreign tensor.
    """

    ours: str
    original: str
    diffusers: str = ""
    ones: int = 0

    def to_foreign(self, value: np.ndarray) -> np.ndarray:
        """The foreign tensor of a leaf of ours, contiguous."""
        if self.ours.endswith("/kernel"):
            value = np.moveaxis(value, (-1, -2), (0, 1))
        return np.ascontiguousarray(value).reshape(*value.shape, *(1,) * self.ones)

    def from_foreign(self, value: np.ndarray) -> np.ndarray:
        """A leaf of ours, contiguous."""
        value = value.reshape(value.shape[: value.ndim - self.ones])
        if self.ours.endswith("/kernel"):
            value = np.moveaxis(value, (0, 1), (-1, -2))
        return np.ascontiguousarray(value)

    def foreign_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the foreign tensor of a leaf of ours."""
        if self.ours.endswith("/kernel"):
            shape = (shape[-1], shape[-2], *shape[:-2])
        return (*shape, *(1,) * self.ones)


def _conv(ours: str, original: str, diffusers: str = "", ones: int = 0, bias: bool = True) -> Iterator[Row]:
    yield Row(f"{ours}/kernel", f"{original}.weight", diffusers and f"{diffusers}.weight", ones)
    if bias:
        yield Row(f"{ours}/bias", f"{original}.bias", diffusers and f"{diffusers}.bias")


def _norm(ours: str, original: str, diffusers: str, ones: int = 3) -> Row:
    return Row(f"{ours}/scale", f"{original}.gamma", f"{diffusers}.gamma", ones)


def _block(ours: str, original: str, diffusers: str, shortcut: bool = False) -> Iterator[Row]:
    yield _norm(f"{ours}/norm1", f"{original}.residual.0", f"{diffusers}.norm1")
    yield from _conv(f"{ours}/conv1", f"{original}.residual.2", f"{diffusers}.conv1")
    yield _norm(f"{ours}/norm2", f"{original}.residual.3", f"{diffusers}.norm2")
    yield from _conv(f"{ours}/conv2", f"{original}.residual.6", f"{diffusers}.conv2")
    if shortcut:
        yield from _conv(f"{ours}/shortcut", f"{original}.shortcut", f"{diffusers}.conv_shortcut", ones=3)


def _resample(ours: str, original: str, diffusers: str, temporal: bool) -> Iterator[Row]:
    yield from _conv(f"{ours}/space", f"{original}.resample.1", f"{diffusers}.resample.1")
    if temporal:
        yield from _conv(f"{ours}/time", f"{original}.time_conv", f"{diffusers}.time_conv", ones=2)


def _ends(part: str) -> Iterator[Row]:
    """What encoder and decoder have in common: both ends and the middle."""
    yield from _conv(f"{part}/conv_in", f"{part}.conv1", f"{part}.conv_in")
    for i, n in ((0, 0), (1, 2)):
        yield from _block(f"{part}/middle/res_{i}", f"{part}.middle.{n}", f"{part}.mid_block.resnets.{i}")
    ours, original, other = f"{part}/middle/attention", f"{part}.middle.1", f"{part}.mid_block.attentions.0"
    yield _norm(f"{ours}/norm", f"{original}.norm", f"{other}.norm", ones=2)
    yield from _conv(f"{ours}/qkv", f"{original}.to_qkv", f"{other}.to_qkv", ones=2)
    yield from _conv(f"{ours}/proj", f"{original}.proj", f"{other}.proj", ones=2)
    yield _norm(f"{part}/norm_out", f"{part}.head.0", f"{part}.norm_out")
    yield from _conv(f"{part}/conv_out", f"{part}.head.2", f"{part}.conv_out")


def _wan_rows(cfg: VAEConfig) -> Iterator[Row]:
    yield from _conv("encoder/quant", "conv1", "quant_conv", ones=3)
    yield from _conv("decoder/quant", "conv2", "post_quant_conv", ones=3)
    for part in ("encoder", "decoder"):
        yield from _ends(part)
    n, last = 0, len(cfg.temporal)  # n: number within the flat lists of the others
    for stage, (inputs, width) in enumerate(zip((cfg.dim, *cfg.widths), cfg.widths)):
        for i in range(cfg.res_blocks):
            names = f"encoder.downsamples.{n}", f"encoder.down_blocks.{n}"
            yield from _block(f"encoder/stages_{stage}/res_{i}", *names, shortcut=i == 0 and inputs != width)
            n += 1
        if stage < last:
            names = f"encoder.downsamples.{n}", f"encoder.down_blocks.{n}"
            yield from _resample(f"encoder/stages_{stage}/resize", *names, cfg.temporal[stage])
            n += 1
    n, widths = 0, cfg.widths[::-1]
    for stage, (inputs, width) in enumerate(zip((widths[0], *(w // 2 for w in widths)), widths)):
        for i in range(cfg.res_blocks + 1):
            names = f"decoder.upsamples.{n}", f"decoder.up_blocks.{stage}.resnets.{i}"
            yield from _block(f"decoder/stages_{stage}/res_{i}", *names, shortcut=i == 0 and inputs != width)
            n += 1
        if stage < last:
            names = f"decoder.upsamples.{n}", f"decoder.up_blocks.{stage}.upsamplers.0"
            yield from _resample(f"decoder/stages_{stage}/resize", *names, cfg.temporal[::-1][stage])
            n += 1


def _tiny_rows(cfg: TinyVAEConfig) -> Iterator[Row]:
    def memory(ours: str, start: int) -> Iterator[Row]:
        part = ours.partition("/")[0]
        for i in range(cfg.blocks):
            for j in range(3):
                yield from _conv(f"{ours}/memory_{i}/conv_{j}", f"{part}.{start + i}.conv.{2 * j}")

    yield from _conv("encoder/conv_in", "encoder.0")
    n = 2  # number within torch's Sequential, which counts activations too
    for stage in range(len(cfg.pool)):
        ours = f"encoder/stages_{stage}"
        yield from _conv(f"{ours}/time", f"encoder.{n}.conv", ones=2, bias=False)
        yield from _conv(f"{ours}/space", f"encoder.{n + 1}", bias=False)
        yield from memory(ours, n + 2)
        n += 2 + cfg.blocks
    yield from _conv("encoder/conv_out", f"encoder.{n}")
    yield from _conv("decoder/conv_in", "decoder.1")
    n = 3
    for stage in range(len(cfg.grow)):
        ours = f"decoder/stages_{stage}"
        yield from memory(ours, n)
        n += cfg.blocks
        yield from _conv(f"{ours}/time", f"decoder.{n + 1}.conv", ones=2, bias=False)
        yield from _conv(f"{ours}/space", f"decoder.{n + 2}", bias=False)
        n += 3
    yield from _conv("decoder/conv_out", f"decoder.{n + 1}")


def rows(vae: VAE) -> tuple[Row, ...]:
    """The table of one autoencoder."""
    return tuple(_tiny_rows(vae.cfg) if isinstance(vae, TinyVAE) else _wan_rows(vae.cfg))


def parameter_shapes(vae: VAE) -> dict[str, tuple[int, ...]]:
    """Path -> shape of every parameter."""
    return {path: tuple(x.shape) for path, x in leaf_paths(jax.eval_shape(vae.init, jax.random.key(0)))}


def describe(vae: VAE) -> str:
    """One line: kind and sizes."""
    cfg = vae.cfg
    if isinstance(vae, TinyVAE):
        return f"a tiny VAE (widths {cfg.encoder_width} and {list(cfg.decoder_widths)}, {cfg.channels} channels)"
    return f"a Wan2.1 VAE (dim {cfg.dim} x {list(cfg.multipliers)}, {cfg.channels} channels)"


# --- reading ------------------------------------------------------------------------------------------------------


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
        raise UserError(f"dtype {dtype!r} is unknown; choose from {', '.join(DTYPES)}.")
    path = Path(path).expanduser()
    if not path.exists():
        raise UserError(f"{path} does not exist; name a file or a folder with the weights of a VAE.")
    if (path / "vae").is_dir():
        path = path / "vae"  # a diffusers pipeline
    files = tensor_files(path)
    naming = _naming(path, files)
    if vae is None:
        vae = TinyVAE() if naming == "tiny" else WanVAE(_config(path) if naming == "diffusers" else VAEConfig())
    if isinstance(vae, TinyVAE) != (naming == "tiny"):
        raise UserError(f"{path} holds a {'tiny' if naming == 'tiny' else 'Wan'} VAE, expected {describe(vae)}.")
    table, shapes, flat = {row.ours: row for row in rows(vae)}, parameter_shapes(vae), {}
    names = {leaf: row.diffusers if naming == "diffusers" else row.original for leaf, row in table.items()}
    for leaf, shape in shapes.items():
        value = table[leaf].from_foreign(_read(path, files, names[leaf], table[leaf].foreign_shape(shape), vae))
        flat[leaf] = jnp.asarray(value if dtype == "keep" else value.astype(jnp.dtype(dtype)))
    if unexpected := sorted(set(files.entries) - set(names.values())):
        more = f" and {len(unexpected) - 1} more" if len(unexpected) > 1 else ""
        raise UserError(f"{path}: unexpected tensor {unexpected[0]}{more}; these are not weights of {describe(vae)}.")
    return vae, nest(flat)


def load_vae_codec(path: str | Path, *, dtype: str = "bfloat16", tiles: Tiles | None = None) -> VAECodec:
    """A codec of the weights at ``path``, which computes in ``dtype``; see `load_vae` and `VAECodec`."""
    vae, params = load_vae(path, dtype=dtype)
    source = str(Path(path).expanduser().resolve())
    return VAECodec(type(vae)(dataclasses.replace(vae.cfg, dtype=dtype)), params, tiles, source)


def _naming(path: Path, files: TensorFiles) -> str:
    names = files.entries
    for naming, key in (("diffusers", "decoder.conv_in.weight"), ("original", "decoder.middle.0.residual.0.gamma"),
                        ("tiny", "decoder.1.weight")):  # fmt: skip
        if key in names:
            return naming
    some = ", ".join(sorted(names)[:2]) or "none"
    raise UserError(f"{path}: its tensors ({some}, ...) are not those of Wan's VAE or of TAEHV; name their file.")


def _config(path: Path) -> VAEConfig:
    file = (path if path.is_dir() else path.parent) / "config.json"
    config = read_config(file)
    if config.get("is_residual") or config.get("patch_size") or config.get("attn_scales"):
        raise UserError(f"{file} describes another VAE (of Wan2.2, say); use the one of a Wan2.1 model.")
    fields = {ours: config[key] for key, ours in _DIFFUSERS_KEYS.items() if key in config}
    try:
        return VAEConfig(**{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()})
    except (TypeError, ValueError) as error:
        raise UserError(f"{file} describes no VAE that is known ({error}); copy the right one.") from error


def _read(path: Path, files: TensorFiles, name: str, wanted: tuple[int, ...], vae: VAE) -> np.ndarray:
    entry = files.entries.get(name)
    if entry is None:
        raise UserError(
            f"{path}: tensor {name} is missing ({len(files.entries)} tensors found); the file is incomplete or of "
            "another model, download it again."
        )
    # Some files of TAEHV keep the weights of a doubling in time where there is none; its last half is what counts.
    surplus = isinstance(vae, TinyVAE) and name.startswith("decoder.") and name.endswith(".conv.weight")
    if entry.shape != wanted and not (surplus and entry.shape == (2 * wanted[0], *wanted[1:])):
        raise UserError(
            f"{entry.file}: tensor {name} has shape {list(entry.shape)}, expected {list(wanted)} for {describe(vae)}."
        )
    try:
        return files.read(name, (slice(None),) * len(entry.shape))[-wanted[0] :]
    except Exception as error:
        raise UserError(f"{entry.file}: tensor {name} cannot be read ({error}).") from error


# --- writing ------------------------------------------------------------------------------------------------------


def foreign_tensors(vae: VAE, params: Mapping[str, Any], naming: str) -> dict[str, np.ndarray]:
    """Name -> tensor under the "original" or the "diffusers" names.

    Raises:
      UserError: names that this autoencoder does not have.
    """
    if naming not in ("original", "diffusers") or (naming == "diffusers" and isinstance(vae, TinyVAE)):
        known = "original" if isinstance(vae, TinyVAE) else "original or diffusers"
        raise UserError(f"{describe(vae)} has no {naming!r} names; use {known}.")
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
        raise UserError(f"{target} is neither .pth, .pt nor .safetensors; name such a file.")
    torch = import_torch("writing a .pth file") if target.suffix in (".pth", ".pt") else None
    with replacing(target, overwrite=overwrite) as partial:
        if form == "diffusers":
            partial.mkdir()
            (partial / "config.json").write_text(json.dumps(diffusers_config(vae.cfg), indent=2) + "\n")
            _save(tensors, partial / "diffusion_pytorch_model.safetensors")
        elif torch is None:
            _save(tensors, partial)
        else:
            torch.save({name: to_torch(tensor) for name, tensor in tensors.items()}, partial)


def _save(tensors: dict[str, np.ndarray], file: Path) -> None:
    from safetensors.numpy import save_file

    save_file(tensors, file, metadata={"format": "pt"})
    file.chmod(0o666 & file.parent.stat().st_mode)  # the library makes it readable for the owner alone


def diffusers_config(cfg: VAEConfig) -> dict[str, Any]:
    """config.json of `AutoencoderKLWan`."""
    fields = {key: getattr(cfg, ours) for key, ours in _DIFFUSERS_KEYS.items()}
    fields = {key: list(value) if isinstance(value, tuple) else value for key, value in fields.items()}
    return {"_class_name": "AutoencoderKLWan", "attn_scales": [], "dropout": 0.0, **fields}
