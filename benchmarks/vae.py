"""How fast does the video autoencoder decode, next to diffusers?

    python benchmarks/vae.py --output benchmarks/results/vae.json

On CPU: process CPU time in one pinned thread, float32, Wan's decoder at half its width with the same random
weights on both sides. Both go through the video one latent frame at a time; ours as a stream, of which the caller gets
every frame at once. Results are compared before anything is timed. Prints medians and their ratio, writes them with
the record of the environment and both sides' matmul rate. Much smaller sizes say little: torch's convolutions of small
inputs are slow in one thread.
"""

import functools
from pathlib import Path

from greedy_distill_jax import cli
from greedy_distill_jax.measure import clock, environment, record


def main() -> None:
    """Command line."""
    parser = cli.Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--dim", type=int, default=48, help="width at full resolution (Wan2.1's is 96)")
    parser.add_argument("--height", type=int, default=128, help="of the video, in pixels")
    parser.add_argument("--width", type=int, default=160, help="of the video, in pixels")
    parser.add_argument("--latent-frames", type=int, default=3, help="four frames of video each, the first one")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, help="also write the figures as JSON")
    args = parser.parse_args()
    clock.one_thread()
    # torch reads the environment when it is imported, here.
    import diffusers
    import jax
    import jax.numpy as jnp
    import numpy as np
    import torch
    from torch_rate import matmul_rates

    from greedy_distill_jax.codecs.vae import VAEConfig, WanVAE
    from greedy_distill_jax.errors import UserError
    from greedy_distill_jax.testing.vae import random_params
    from greedy_distill_jax.weights.vae import diffusers_config, foreign_tensors

    if jax.default_backend() != "cpu":
        raise UserError("this benchmark compares CPU times; run it with JAX_PLATFORMS=cpu.")
    torch.set_num_threads(1)

    vae = WanVAE(VAEConfig(dim=args.dim))
    params, stride = random_params(vae), vae.cfg.spatial_stride
    other = diffusers.AutoencoderKLWan.from_config(diffusers_config(vae.cfg)).eval()
    other.load_state_dict({n: torch.tensor(x) for n, x in foreign_tensors(vae, params, "diffusers").items()})
    shape = (1, args.latent_frames, args.height // stride, args.width // stride, vae.cfg.channels)
    latents = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    raw = latents * np.asarray(vae.cfg.std, np.float32) + np.asarray(vae.cfg.mean, np.float32)
    step, theirs_in = jax.jit(vae.decode_step), torch.from_numpy(raw).permute(0, 4, 1, 2, 3)

    def ours():
        cache, frames = None, []
        for i in range(args.latent_frames):
            cache, more = step(params, cache, jnp.asarray(latents[:, i : i + 1]))
            frames.append(np.asarray(more))
        return np.concatenate(frames, axis=1)

    @torch.no_grad()
    def theirs():
        return other.decode(theirs_in).sample.permute(0, 2, 3, 4, 1).numpy()

    difference = float(np.abs(ours() - theirs()).max())
    assert difference < 5e-5, difference
    cache, _ = step(params, None, jnp.asarray(latents[:, :1]))
    cache = jax.block_until_ready(cache)
    first, later = (jnp.asarray(latents[:, i : i + 1]) for i in (0, 1))
    parts = {
        "ours, whole video": ours,
        "diffusers, whole video": theirs,
        "ours, first latent frame": functools.partial(step, params, None, first),
        "ours, every other latent frame": functools.partial(step, params, cache, later),
    }
    times = {name: clock.median_ms(run, args.repeats) for name, run in parts.items()}
    for name, milliseconds in times.items():
        print(f"{name:32s} {milliseconds:9.1f} ms")
    ratio = times["diffusers, whole video"] / times["ours, whole video"]
    print(f"diffusers / ours: {ratio:.2f}   largest difference of a pixel in [-1, 1]: {difference:.1e}")
    rates = matmul_rates("float32")
    print(f"matmul: {', '.join(f'{name} {rate / 1e9:.0f} GFLOP/s' for name, rate in rates.items())}")
    result = {
        "milliseconds": times,
        "ratios": {"diffusers / ours": ratio},
        "largest_difference": difference,
        "config": {"dim": args.dim, "latents": shape, "dtype": "float32"},
        "matmul_flops_per_s": rates,
        **environment.environment(),
    }
    record.write_json(args.output, result)


if __name__ == "__main__":
    cli.run(main)
