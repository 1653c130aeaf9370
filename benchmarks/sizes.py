"""Sizes that benchmarks run, by name: the configurations of ``wan1_3b``, and narrow ones of the same code."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from greedy_distill_jax.cli.config_flags import CHECKOUT, read_config
from greedy_distill_jax.codecs.vae import VAEConfig, WanVAE
from greedy_distill_jax.codecs.vae_codec import VAECodec
from greedy_distill_jax.codecs.vae_tiny import TinyVAE, TinyVAEConfig
from greedy_distill_jax.config import read_settings
from greedy_distill_jax.runs.run import Run
from greedy_distill_jax.testing import vae as random_vae

# What is streamed, and trained, by configuration file.
CONFIGS = {
    "etm_sdd": "configs/wan1_3b/teacher_forcing.py",
    "causal": "configs/wan1_3b/causal.py",
    "dmd": "configs/wan1_3b/dmd.py",
}


@dataclasses.dataclass(frozen=True)
class Size:
    """A video, a Wan DiT (``config.model``; {} for 1.3B) and both decoders.

    Attributes:
      height, width: of the video in pixels; both autoencoders have eight pixels per latent pixel.
      frames: latent frames of a training example.
      model: changes to ``config.model``.
      wan_vae, tiny_vae: sizes of the decoders.
    """

    height: int
    width: int
    frames: int
    model: Mapping[str, Any]
    wan_vae: VAEConfig
    tiny_vae: TinyVAEConfig

    def config(self, name: str) -> Any:
        """The configuration ``CONFIGS[name]`` at this size, for one video on one device."""
        config = read_config(str(CHECKOUT / CONFIGS[name]))
        config.update_from_flattened_dict({f"model.{key}": value for key, value in self.model.items()})
        config.data.frames, config.data.batch, config.data.accumulate = self.frames, 1, 1
        config.mesh.data = config.mesh.fsdp = config.mesh.context = config.mesh.tensor = 1
        config.compile_cache = ""
        return config

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(H, W, C) of a latent frame."""
        return self.height // 8, self.width // 8, self.wan_vae.channels

    def codecs(self) -> dict[str, VAECodec]:
        """Codecs with random weights in the dtype they compute in, by name."""

        def codec(network):
            params = random_vae.random_params(network)
            return VAECodec(network, jax.tree.map(lambda x: x.astype(jnp.dtype(network.cfg.dtype)), params))

        return {"tiny VAE": codec(TinyVAE(self.tiny_vae)), "Wan VAE": codec(WanVAE(self.wan_vae))}

    def run(self, student: str, weights: str = "float32") -> Run:
        """A student of random weights, as ``Run.load`` would give it; ``weights``: dtype of its matmuls' kernels."""
        settings = read_settings(self.config(student), imagine_runs=True)
        model, shape = settings.kind.model(settings), (self.frames, *self.latent_shape)
        shapes = jax.eval_shape(lambda key: model.init(key, shape), jax.random.key(0))
        params = random_params(shapes, jax.random.key(0), weights)
        return Run(settings, model, params, None, None, shape, {})


SIZES = {
    # Of the tests.
    "tiny": Size(
        *(32, 32, 6),
        dict(dim=24, ffn_dim=48, num_heads=2, num_layers=2, freq_dim=16, text_dim=8, text_len=6, dtype="float32"),
        VAEConfig(dim=2, res_blocks=1),
        TinyVAEConfig(decoder_widths=(8, 4, 4, 4), blocks=1),
    ),
    # Of a CPU: minutes in one thread.
    "small": Size(
        *(128, 128, 21),
        dict(dim=128, ffn_dim=768, num_heads=2, num_layers=4, freq_dim=64, text_dim=64, text_len=32, dtype="float32"),
        VAEConfig(dim=8),
        TinyVAEConfig(decoder_widths=(32, 16, 8, 8)),
    ),
    # A few frames of it on a CPU: large enough that the overhead of single operations does not count.
    "medium": Size(
        *(240, 416, 21),
        dict(dim=512, ffn_dim=3072, num_heads=4, num_layers=8, freq_dim=128, text_dim=256, text_len=128)
        | dict(dtype="float32"),
        VAEConfig(dim=32),
        TinyVAEConfig(decoder_widths=(128, 64, 32, 32)),
    ),
    "wan1_3b": Size(480, 832, 21, {}, VAEConfig(dtype="bfloat16"), TinyVAEConfig(dtype="bfloat16")),
}


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _draw(key, shape: tuple[int, ...], dtype: str, scale: float):
    return (jax.random.normal(key, shape, jnp.float32) * jnp.float32(scale)).astype(jnp.dtype(dtype))


def random_params(shapes: Any, key: jax.Array, kernels: str | None = None) -> Any:
    """Parameters of a DiT's tree, drawn on the device, none of them zero; signals keep a scale of about one.

    Args:
      shapes: ``jax.eval_shape(model.init, ...)``, nested dictionaries.
      key: of the draw.
      kernels: dtype of the matmuls' kernels; None for their own, which everything else keeps.
    """

    def draw(number, path, leaf):
        kernel = path[-1].key == "kernel"
        scale, dtype = (leaf.shape[-2] ** -0.5, kernels or str(leaf.dtype)) if kernel else (0.3, str(leaf.dtype))
        value = _draw(jax.random.fold_in(key, number), leaf.shape, dtype, scale)
        return value + jnp.asarray(1, value.dtype) if path[-1].key == "scale" else value

    leaves, tree = jax.tree_util.tree_flatten_with_path(shapes)
    return jax.tree.unflatten(tree, [draw(number, path, leaf) for number, (path, leaf) in enumerate(leaves)])
