"""The streaming decoders, Wan's and the tiny one, compiled in bfloat16 for devices that are not there."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from greedy_distill_jax.codecs.vae import VAEConfig, WanVAE
from greedy_distill_jax.codecs.vae_codec import VAECodec
from greedy_distill_jax.codecs.vae_tiny import TinyVAE, TinyVAEConfig
from greedy_distill_jax.measure.memory import program_bytes
from greedy_distill_jax.ops.attention import aot

DECODERS = ("wan", "tiny")


def compile_decoders(
    targets: Sequence[str], decoders: Sequence[str], height: int, width: int, say: Callable[[str], None]
) -> list[str]:
    """Compiles both programs of a stream's decoder: for the first latent frame, and for all others.

    Args:
      targets: names of ``aot.TOPOLOGIES``.
      decoders: of ``DECODERS``.
      height, width: of the video, in pixels.
      say: takes one line.

    Returns:
      What the compiler refused.

    Raises:
      UserError: libtpu is not installed, or a size that the autoencoders cannot have.
    """
    kinds = {"wan": WanVAE(VAEConfig(dtype="bfloat16")), "tiny": TinyVAE(TinyVAEConfig(dtype="bfloat16"))}
    failures = []
    for target in targets:
        place = NamedSharding(aot.target_mesh(target), PartitionSpec())
        say(f"{target}, libtpu {aot.libtpu_version()}, {width}x{height}, one device")
        for name in decoders:
            try:
                for which, parts in _programs(VAECodec(kinds[name], None), height, width, place):
                    total = parts.pop("total")
                    listed = "  ".join(f"{part} {size / 2**20:.0f} MiB" for part, size in parts.items())
                    say(f"  {name:5s} {which:12s} {total} bytes: {listed}")
            except jax.errors.JaxRuntimeError as error:  # what the compiler says is the answer; the rest is compiled
                say(f"  {name:5s} FAILED: {str(error).splitlines()[0][:160]}")
                failures.append(f"{target} {name}")
    return failures


def _programs(codec: VAECodec, height: int, width: int, place: NamedSharding) -> Iterator[tuple[str, dict[str, int]]]:
    """(which program, bytes of one device by what they are for), one after the other."""

    def placed(tree: Any, dtype=None) -> Any:
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype or x.dtype, sharding=place), tree)

    params = placed({"decoder": jax.eval_shape(codec.vae.init, jax.random.key(0))["decoder"]}, jnp.bfloat16)
    latent = placed(jax.ShapeDtypeStruct((1, *codec.latent_shape(height, width)), jnp.float32))
    state, step = codec.open_decoder(), jax.jit(codec.decode_next, donate_argnums=1)
    for which in ("first frame", "next frames"):
        parts = program_bytes(aot.interruptible(step.lower(params, state, latent).compile))
        yield which, parts  # the cache stays in place: it counts once
        state = placed(jax.eval_shape(codec.decode_next, params, state, latent)[0])
