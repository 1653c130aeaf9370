"""What a job is, in numbers that a reader can hold against a paper: networks, tokens, batch, streams."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from greedy_distill_jax.config import Settings
from greedy_distill_jax.diffusion import guidance
from greedy_distill_jax.distribution.mesh import batch_parts
from greedy_distill_jax.distribution.sharding import leaf_paths
from greedy_distill_jax.pods.jobs import STREAM, Job
from greedy_distill_jax.training.stages import rl_keys


def facts(job: Job) -> dict[str, Any]:
    """Returns what a job compiles, read from the shapes that are handed to the compiler wherever they tell."""
    c, wan = job.settings, job.settings.wan
    state, frozen, batch = (job.trees[name][0] for name in ("state", "frozen", "batch"))
    own, critic = state.nets[job.stage.name], state.nets.get("critic")
    params, critic = own.params, critic and critic.params
    count, (frames, height, width, channels) = len(batch["text"]), job.latent_shape
    (kernel,) = {x.shape[0] for path, x in leaf_paths(params) if path.endswith("embed/patch/kernel")}
    tokens = height * width * channels // kernel
    facts = {
        "stage": c.stage,
        "steps": [step.name for step in job.steps],
        "frames": frames,
        "tokens_per_frame": tokens,
        "tokens": frames * tokens,
        "latents": f"{height}x{width}",
        "channels": channels,
        "text_rows": batch["text"].shape[1],
        "networks": {name: networks(tree) for name, tree in (("trained", params), ("critic", critic))}
        | {name: networks(tree) for name, tree in frozen.items()},
        "parameters": parameters(params),
        "ema_parameters": parameters(own.ema),
        "optimizer_parameters": parameters(own.opt_state),
        "teacher_parameters": parameters(frozen.get("teacher")),
        "critic_parameters": parameters(critic),
        "cfg_branches": cfg_branches(c),
        "batch": count,
        "accumulate": c.data.accumulate,
        "microbatch_per_group": count // c.data.accumulate // batch_parts(job.mesh),
        "mesh": {name: int(size) for name, size in job.mesh.shape.items()},
        "devices": int(job.mesh.size),
        "dtype": wan.dtype,
        "remat": wan.remat,
    }
    episodes = [part.takes for part in job.stage.parts if "visited" in part.takes]
    if episodes:
        streams, longest = episodes[0]["frames"].shape[:2]
        facts["episode"] = {"group": streams // count, "frames": longest, "clip": episodes[0]["visited"].shape[1]}
    if STREAM in job.trees:
        last = job.trees[STREAM][0].last
        facts["streams"] = {
            "streams": last.shape[0],
            "frames_per_step": last.shape[1],
            "latents": f"{last.shape[2]}x{last.shape[3]}",
            "denoising_calls": int(c.plan.lengths[-1]),
        }
    return facts


def networks(tree) -> dict[str, list[int]]:
    """Returns {path of every stack of blocks: [blocks, width]} of a tree of parameters."""
    end = "blocks/self_attn/q/kernel"
    return {path.removesuffix(end).strip("/"): list(x.shape[:2]) for path, x in leaf_paths(tree) if path.endswith(end)}


def cfg_branches(settings: Settings) -> int:
    """Counts how often the real score's network is asked for one velocity, by asking."""
    asked = []

    def score(x, sigma, batch):
        asked.append(batch)
        return x

    if settings.stage != "dmd" and not (settings.stage == "rl" and "pair" in rl_keys.asks_of(settings)):
        return 1
    net, one = guidance.guided_score(score, jnp.zeros((1, 1)), settings.own["distill"].guidance), jnp.zeros(1)
    with jax.disable_jit():
        net(one, one, {"text": jnp.zeros((1, 1, 1))})
    return len(asked)


def parameters(tree) -> int:
    """Returns the number of elements of a tree."""
    return sum(int(np.prod(x.shape)) for x in jax.tree.leaves(tree))
