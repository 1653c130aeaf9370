"""LoRA as an optimiser: factors of low rank are trained, and a network's parameters always have them merged in."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from greedy_distill_jax.config.keys import Lora
from greedy_distill_jax.errors import UserError
from greedy_distill_jax.storage.trees import Path, flatten, nest


class Factors(NamedTuple):
    """Those of one linear's kernel [layers, in, out].

    lora_A: [layers, in, rank]. lora_B: [layers, rank, out].
    """

    lora_A: jax.Array
    lora_B: jax.Array


class LoraState(NamedTuple):
    """State of the optimiser.

    factors: the tree of the parameters as far as the linears that are targets, with Factors in their places.
    inner: of the optimiser of the factors.
    """

    factors: Any
    inner: Any


def lora(inner: optax.GradientTransformation, keys: Lora, *, seed: int, path: str) -> optax.GradientTransformation:
    """Trains factors A and B of the targets' kernels, W = W_0 + alpha / rank A B, and nothing else.

    It is given the gradient of the merged W and returns the change of it, so that whoever holds the parameters
    (rollouts, averages, checkpoints, exports) knows nothing of factors. From the gradient of W follow those of A and B,
    on which ``inner`` works: its moments have the factors' size, and its clipping and weight decay are of A and B. The
    gradient of W itself is whole. A starts as PEFT's does, uniform in +-1 / sqrt(in), B at zero.

    Args:
      inner: optimiser of the factors.
      keys: rank (0: ``inner`` itself is returned), alpha and targets.
      seed: of A.
      path: of the keys, for errors.

    Returns:
      The optimiser, whose ``init`` raises UserError for a target that no block has and a rank that no factor can have.

    References:
      Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, arXiv 2106.09685
    """
    if not keys.rank:
        return inner
    targets = [name.strip() for name in keys.targets.split(",")]

    def product(factors):
        """What the factors add to their kernels; exact, because it is added for good at every update."""

        def one(f: Factors) -> dict[str, jax.Array]:
            return {"kernel": keys.scale * jnp.matmul(f.lora_A, f.lora_B, precision="highest")}

        return jax.tree.map(one, factors, is_leaf=lambda node: isinstance(node, Factors))

    def chosen(tree) -> dict[Path, jax.Array]:
        return {leaf: kernel for leaf, kernel in _kernels(tree).items() if leaf[-2] in targets}

    def init(params) -> LoraState:
        _check(_kernels(params), targets, keys.rank, path)
        kernels = chosen(params)
        draws = jax.random.split(jax.random.key(seed), len(kernels))
        pairs = zip(draws, kernels.items(), strict=True)
        factors = nest({leaf[:-1]: _first_factors(key, kernel, keys.rank) for key, (leaf, kernel) in pairs})
        return LoraState(factors, inner.init(factors))

    def update(grads, state: LoraState, params=None):
        before, pull_back = jax.vjp(product, state.factors)
        (of_factors,) = pull_back(nest({leaf: g.astype(jnp.float32) for leaf, g in chosen(grads).items()}))
        steps, after_inner = inner.update(of_factors, state.inner, state.factors)
        factors = optax.apply_updates(state.factors, steps)
        changes = dict(flatten(jax.tree.map(jnp.subtract, product(factors), before)))
        updates = [changes.get(leaf, jnp.zeros_like(g)) for leaf, g in flatten(grads)]
        return jax.tree.unflatten(jax.tree.structure(grads), updates), LoraState(factors, after_inner)

    return optax.GradientTransformation(init, update)


def _kernels(tree) -> dict[Path, jax.Array]:
    """The kernels of all linears of the blocks, by path; the last name of a path is "kernel"."""
    return {path: leaf for path, leaf in flatten(tree) if path[-1] == "kernel" and "blocks" in path}


def _first_factors(key, kernel: jax.Array, rank: int) -> Factors:
    *layers, inputs, outputs = kernel.shape
    bound = inputs**-0.5
    a = jax.random.uniform(key, (*layers, inputs, rank), jnp.float32, -bound, bound)
    return Factors(a, jnp.zeros((*layers, rank, outputs), jnp.float32))


def _check(kernels: Mapping[Path, jax.Array], targets: list[str], rank: int, path: str) -> None:
    known = sorted({leaf[-2] for leaf in kernels})
    for target in targets:
        if target not in known:
            raise UserError(
                f"{path}.targets names {target!r}, but the blocks have no such linear; choose from {', '.join(known)}."
            )
    for leaf, kernel in kernels.items():
        *_, inputs, outputs = kernel.shape
        if leaf[-2] in targets and rank > min(inputs, outputs):
            raise UserError(
                f"{path}.rank is {rank}, but {'/'.join(leaf[:-1])} maps {inputs} numbers to {outputs}; choose at most "
                f"{min(inputs, outputs)}."
            )
