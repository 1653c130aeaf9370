"""Where every array lives: ONE ordered table path-regex -> logical axes, ONE rules object logical -> mesh axes.

Paths are joined with "/" and matched from the right, so that the same row serves a parameter, its EMA and its
optimiser moments. Every leaf must match exactly one row; a leaf without a row is an error, not a default.
"""

import dataclasses
import re
from collections.abc import Iterator

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from greedy_distill_jax.errors import UserError

TABLE: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"blocks/(self|cross)_attn/(q|k|v|z_k|z_v)/kernel", ("layers", "embed", "heads")),
    (r"blocks/(self|cross)_attn/(q|k|v|z_k|z_v)/bias", ("layers", "heads")),
    (r"blocks/(self|cross)_attn/o/kernel", ("layers", "heads", "embed")),
    (r"blocks/(self|cross)_attn/o/bias", ("layers", "embed")),
    (r"blocks/(self|cross)_attn/norm_(q|k|z)/scale", ("layers", "heads")),
    (r"blocks/ffn/up/kernel", ("layers", "embed", "mlp")),
    (r"blocks/ffn/up/bias", ("layers", "mlp")),
    (r"blocks/ffn/down/kernel", ("layers", "mlp", "embed")),
    (r"blocks/ffn/down/bias", ("layers", "embed")),
    (r"blocks/norm3/(scale|bias)", ("layers", None)),
    (r"blocks/modulation", ("layers", None, "embed")),
    (r"blocks/z_gate", ("layers", None)),
    # The factors of LoRA lie as their kernel does, with the rank whole on every device.
    (r"blocks/((self|cross)_attn/(q|k|v|z_k|z_v)|ffn/up)/lora_A", ("layers", "embed", None)),
    (r"blocks/(self|cross)_attn/(q|k|v|z_k|z_v)/lora_B", ("layers", None, "heads")),
    (r"blocks/(self|cross)_attn/o/lora_A", ("layers", "heads", None)),
    (r"blocks/ffn/up/lora_B", ("layers", None, "mlp")),
    (r"blocks/ffn/down/lora_A", ("layers", "mlp", None)),
    (r"blocks/((self|cross)_attn/o|ffn/down)/lora_B", ("layers", None, "embed")),
    (r"embed/(patch|text_in|time_in)/kernel", (None, "embed")),
    (r"embed/(text_out|time_out)/kernel", ("embed", None)),
    (r"embed/time_projection/kernel", ("embed", None)),
    (r"embed/(patch|text_in|text_out|time_in|time_out|time_projection)/bias", (None,)),
    (r"z_in/kernel", ("embed", None)),
    (r"z_in/bias", (None,)),
    (r"head/projection/kernel", ("embed", None)),
    (r"head/projection/bias", (None,)),
    (r"head/modulation", (None, "embed")),
    (r"bos", (None,)),
    (r"etm/norm/(scale|bias)", (None,)),
    (r"(hidden_\d+/conv|mix)/kernel", (None, None, None, None)),  # of the motion head, which is small
    (r"(hidden_\d+/conv|mix)/bias", (None,)),
    (r"hidden_\d+/norm/(scale|bias)", (None,)),
    (r"rewards/.+", ("batch",)),
    (r"sigma|next_sigma|kept_sigma", (None,)),
    # Not parameters: counters and keys of updates and of streams, and Muon's polynomial.
    (r"count|step|index|start", ()),
    (r"key", ("batch",)),  # one per video; one for all of them is whole on every device
    (r"ns_coeffs", (None,)),
    # Batches, and what a stream carries from chunk to chunk.
    (
        r"latents|last|clean|frames|noise|x0_real|visited|following|kept_input",
        ("batch", None, None, None, None),
    ),
    (r"states", ("batch", None, None, None, None, None)),
    (r"((etm|sdd|sdd_context|context)_)?(cache|text)/(k|v)", ("layers", "batch", None, "heads", None)),
    (r"(etm_)?slots", (None,)),
    (r"z", ("batch", None, None)),
    (r"text", ("batch", None, None)),
)


WHOLE = "codec/"  # paths of what every device has whole: a codec's parameters may have any names


@dataclasses.dataclass(frozen=True)
class Rules:
    """Logical axis -> mesh axes."""

    batch: tuple[str, ...] = ("data", "fsdp")
    columns: tuple[str, ...] = ("context",)  # of every frame, inside the networks: see parallel.py
    embed: tuple[str, ...] = ("fsdp", "context")  # of parameters and moments, not of activations
    heads: tuple[str, ...] = ("tensor",)
    mlp: tuple[str, ...] = ("tensor",)
    layers: tuple[str, ...] = ()

    def spec(self, logical: tuple[str | None, ...]) -> PartitionSpec:
        """Returns the PartitionSpec of an array with the given logical axes."""
        axes = [None if name is None else getattr(self, name) for name in logical]
        used = [axis for group in axes if group for axis in group]
        if len(set(used)) != len(used):
            raise ValueError(f"Two dimensions of {logical} would share a mesh axis: {axes}.")
        return PartitionSpec(*(group or None for group in axes))


RULES = Rules()


def rows_of(path: str) -> list[int]:
    """Returns the numbers of the table rows that match a leaf's path."""
    return [i for i, (pattern, _) in enumerate(TABLE) if re.search(rf"(^|/)({pattern})$", path)]


def leaf_paths(tree) -> Iterator[tuple[str, jax.Array]]:
    """Yields ("a/b/c", leaf) for every leaf."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        yield "/".join(_key_name(key) for key in path), leaf


def _key_name(key) -> str:
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)


def shardings(tree, mesh: Mesh, rules: Rules = RULES):
    """Returns a NamedSharding for every leaf of a tree of arrays or shapes; raises as ``specs``."""
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs(tree, mesh, rules))


def specs(tree, mesh: Mesh | AbstractMesh, rules: Rules = RULES):
    """Returns a PartitionSpec for every leaf of a tree of arrays or shapes; axes that the mesh lacks split nothing.

    Raises:
      ValueError: a leaf that matches no row or several, or whose rank differs from its row's.
      UserError: a size that does not divide by the mesh axes of its row.
    """
    out = []
    for path, leaf in leaf_paths(tree):
        if path.startswith(WHOLE):
            out.append(PartitionSpec())
            continue
        rows = rows_of(path)
        if len(rows) != 1:
            raise ValueError(f"sharding: {path} matches rows {rows} of sharding.TABLE; it must match exactly one.")
        logical = TABLE[rows[0]][1]
        if leaf.ndim == 0 and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            logical = ()
        if len(logical) != leaf.ndim:
            raise ValueError(f"sharding: {path} has shape {leaf.shape}, but its row lists the axes {logical}.")
        spec = [(axes,) if isinstance(axes, str) else axes or () for axes in rules.spec(logical)]
        spec = [tuple(a for a in axes if a in mesh.shape) for axes in spec]
        for size, axes in zip(leaf.shape, spec, strict=True):
            parts = int(np.prod([mesh.shape[a] for a in axes]))
            if size % parts:
                raise UserError(
                    f"sharding: {path} {leaf.shape}: {size} does not divide into {parts} parts ({axes}); "
                    f"choose a smaller mesh axis or another width."
                )
        out.append(PartitionSpec(*spec))
    return jax.tree.unflatten(jax.tree.structure(tree), out)


def with_shardings(tree, of):
    """The shapes of a tree, with the sharding of every leaf."""
    return jax.tree.map(lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree, of)
