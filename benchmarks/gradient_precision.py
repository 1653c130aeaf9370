"""How far the gradient of a bfloat16 DiT is from a float32 one, by the number of devices that its batch is split over.

    python benchmarks/gradient_precision.py --output benchmarks/results/gradient-precision

Every number of devices is a process of its own with so many virtual CPU devices, the batch split over all of them. Two
distances, by norm over all parameters: to the gradient of the float32 network on one device, which holds what bfloat16
costs in all, and to that of the bfloat16 network on one device with float32 gradients, whose forward pass is rounded
alike, which holds what the making and summing of gradients costs.

The compiler for CPUs makes sums of bfloat16 over devices in float32, and rounds once. What a device does that adds
rounded numbers is imitated ("compute, bfloat16 sums"): the gradient of every device's part of the batch, rounded as it
is made, added one after the other in bfloat16.
"""

import dataclasses
import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from greedy_distill_jax import cli
from greedy_distill_jax.distribution import parallel
from greedy_distill_jax.distribution.mesh import make_mesh
from greedy_distill_jax.distribution.sharding import shardings
from greedy_distill_jax.measure import environment, record
from greedy_distill_jax.models.wan.config import WAN_SIZES, WanConfig
from greedy_distill_jax.models.wan.dit import Teacher
from greedy_distill_jax.ranges import Count
from greedy_distill_jax.testing import tiny

GRADIENTS = ("compute", "float32")  # config.model.gradient_dtype: as it was, as it is
ADDED = "compute, bfloat16 sums"
KINDS = ("to float32", "to the same forward pass")


def distance(tree, reference) -> float:
    """Norm of the difference over that of the reference."""
    tree, reference = (jax.device_get(x) for x in (tree, reference))
    return float(optax.tree.norm(jax.tree.map(jnp.subtract, tree, reference)) / optax.tree.norm(reference))


def added(parts: list):
    """Sum of gradients, one after the other: in bfloat16 where all their numbers are of that type."""

    def add(*leaves):
        rounded = [x.astype(jnp.bfloat16) for x in leaves]
        if all(bool((x == y.astype(x.dtype)).all()) for x, y in zip(leaves, rounded, strict=True)):
            leaves = rounded
        return functools.reduce(jnp.add, leaves).astype(jnp.float32)

    return jax.tree.map(add, *parts)


def measure(devices: int, dim: int, layers: int, batch: int) -> dict[str, float]:
    """The distances of one number of devices, which this process must have."""
    cfg = WanConfig(**WAN_SIZES["tiny"] | dict(dim=dim, ffn_dim=4 * dim, num_layers=layers, num_heads=dim // 64 or 1))
    shape = (2, 8, 8, cfg.channels)
    params = tiny.random_params(Teacher(cfg), latent_shape=shape)
    keys = jax.random.split(jax.random.key(0), 4)
    x, target = (jax.random.normal(key, (batch, *shape)) for key in keys[:2])
    data = x, jax.random.uniform(keys[2], (batch, 1)), tiny.text_rows(batch, keys[3], cfg), target

    def run(dtype: str, gradient_dtype: str, count: int, data=data):
        net = Teacher(dataclasses.replace(cfg, dtype=dtype, gradient_dtype=gradient_dtype))
        mesh = make_mesh({"data": count}, jax.devices()[:count])

        def loss(params, x, sigma, text, target):
            v = net(params, x, sigma, text).astype(jnp.float32)
            return jnp.sum(jnp.square(v - target)), v

        def call(params, batch):
            grads, v = jax.grad(loss, has_aux=True)(params, *batch)
            return parallel.at_rest(grads), v

        rows = NamedSharding(mesh, PartitionSpec("data"))
        placed = jax.device_put(params, shardings(params, mesh)), jax.device_put(data, rows)
        return jax.jit(parallel.on_mesh(call, mesh))(*placed)

    exact, exact_v = run("float32", "float32", 1)
    alike, alike_v = run("bfloat16", "float32", 1)
    found, grads = {"velocity": distance(alike_v, exact_v)}, {}
    for name in GRADIENTS:
        grads[name], _ = run("bfloat16", name, devices)
    parts = zip(*(jnp.split(x, devices) for x in data), strict=True)
    grads[ADDED] = added([run("bfloat16", "compute", 1, part)[0] for part in parts])
    for name, tree in grads.items():
        found |= {f"{name}, {kind}": distance(tree, ref) for kind, ref in zip(KINDS, (exact, alike), strict=True)}
    return found


def main() -> None:
    """Command line."""
    parser = cli.Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--devices", type=cli.number(Count), nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--dim", type=cli.number(Count), default=256)
    parser.add_argument("--layers", type=cli.number(Count), default=4)
    parser.add_argument("--batch", type=cli.number(Count), default=16)
    parser.add_argument("--output", type=Path, help="writes OUTPUT.json and OUTPUT.md")
    parser.add_argument("--here", action="store_true", help="measure one number of devices in this process, as JSON")
    args = parser.parse_args()
    sizes = args.dim, args.layers, args.batch
    if args.here:
        print(json.dumps(measure(args.devices[0], *sizes)))
        return
    rows = {}
    for count in args.devices:
        flags = f"--xla_force_host_platform_device_count={count}"
        command = [sys.executable, __file__, "--here", f"--devices={count}"]
        command += [f"--dim={args.dim}", f"--layers={args.layers}", f"--batch={args.batch}"]
        env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}"}
        done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True)
        rows[count] = json.loads(done.stdout.splitlines()[-1])
        print(
            f"{count:>3} devices  " + "  ".join(f"{key} {value:.2e}" for key, value in rows[count].items()), flush=True
        )
    if args.output:
        settings = dict(zip(("dim", "layers", "batch"), sizes, strict=True))
        record.write_json(
            args.output.with_suffix(".json"), {"settings": settings, "rows": rows, **environment.environment()}
        )
        columns = [f"{name}, {kind}" for kind in KINDS for name in (ADDED, *GRADIENTS)]
        cells = [[count, *(f"{row[column]:.2e}" for column in columns)] for count, row in rows.items()]
        velocity = f"The velocity of the bfloat16 network is {rows[args.devices[0]]['velocity']:.2e} from float32.\n"
        text = f"{record.table(['devices', *columns], cells)}\n\n{velocity}"
        args.output.with_suffix(".md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    cli.run(main)
