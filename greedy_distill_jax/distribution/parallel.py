"""The mesh as networks see it: they are written for one device and traced under ``on_mesh``.

Batch and widths are left to the compiler, which partitions by the shardings of parameters and batch. Two things are
not:
- attention kernels cannot be partitioned automatically, so ``attention`` runs them, and only them, under
  ``shard_map``;
- the context axis splits every latent frame into stripes of columns (``split_videos``). Each device runs the networks
  on its stripe of all frames; only ``attention`` looks beyond it, by gathering the keys of whole frames. Nothing is
  approximated. A stripe of every frame, and not every n-th frame, because 21 latent frames do not divide by 2 or 4
  (all v5e and v6e slices are powers of two), because windows and causal masks then cost every device the same, and
  because the rollout, which makes one frame at a time, is split as well. Parameters are split over this axis at rest
  only: every call gathers its whole stack of them over the axis first, all layers at once. What it saves is memory
  and work of activations.

Without a mesh, on one device, or under a mesh with none of our axes, all of this is the identity.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax.sharding import AbstractMesh, Mesh, PartitionSpec
from jaxtyping import Array, Float, Int32

from greedy_distill_jax.distribution.sharding import RULES, specs
from greedy_distill_jax.errors import UserError
from greedy_distill_jax.ops.attention import Pattern, chunk_attention, select

WIDTH = 3  # axis of the columns in [B, T, H, W, C]
OURS = tuple({axis for axes in dataclasses.astuple(RULES) for axis in axes})  # mesh axes


def on_mesh(call: Callable, mesh: Mesh) -> Callable:
    """Returns ``call`` traced for ``mesh``: for the platform of its devices, too, which need not be this machine's."""

    @functools.wraps(call)
    def traced(*args, **kwargs):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return call(*args, **kwargs)

    return traced


def _present(mesh, axes) -> tuple[str, ...]:
    """Those of the axes that an ambient mesh, which may be another library's, has for the compiler to use."""
    axes = (axes,) if isinstance(axes, str) else axes or ()
    return tuple(a for a in axes if a in mesh.axis_names and a not in mesh.manual_axes)


def _parts(mesh, axes) -> int:
    return int(np.prod([mesh.shape[a] for a in _present(mesh, axes)]))


def _stripes() -> tuple[int, str | None]:
    """(stripes of a frame, mesh axis) inside ``split_videos``, else (1, None)."""
    mesh, (axis,) = jax.sharding.get_abstract_mesh(), RULES.columns
    return (mesh.shape[axis], axis) if axis in mesh.manual_axes else (1, None)


def check_columns(mesh: Mesh, columns: int) -> None:
    """Raises UserError when a frame of so many columns of patches does not divide over the context axis."""
    why = "but every latent frame has {size} columns of patches, which do not divide by {parts}"
    _check_divides(mesh, RULES.columns, columns, why)


def check_heads(mesh: Mesh | AbstractMesh, heads: int) -> None:
    """Raises UserError when so many attention heads do not divide over the tensor axis."""
    _check_divides(
        mesh, RULES.heads, heads, "which does not divide the {size} attention heads of a network of this job"
    )


def _check_divides(mesh: Mesh | AbstractMesh, axes: tuple[str, ...], size: int, why: str) -> None:
    parts = _parts(mesh, axes)
    if size % parts:
        choices = ", ".join(str(d) for d in range(1, size + 1) if size % d == 0)
        raise UserError(
            f"the mesh axis {axes[0]} is {parts}, {why.format(size=size, parts=parts)}; choose from {choices}",
            f"mesh.{axes[0]}",
        )


def split_videos(call: Callable, *args, whole: int = 0):
    """Calls ``call(*args)`` with videos split over the context axis.

    Args:
      call: a pure function. It sees arrays [B, T, H, W / parts, C] where it is given [B, T, H, W, C].
      *args: arrays and trees of them; what has five dimensions is a video and is split, the rest is not. A NamedTuple
        with ``AXES`` (the state of a stream) says itself which axis of its fields is split.
      whole: so many arguments, from the first, hold no videos (parameters).

    Returns:
      ``call``'s result; what is split is put together again. (A state's keys then lie stripe after stripe: it is good
      for another call on the same mesh.)
    """
    mesh, (axis,) = jax.sharding.get_abstract_mesh(), RULES.columns
    if _parts(mesh, axis) == 1:
        return call(*args)

    nothing = PartitionSpec()

    def split(columns: int | None):
        return nothing if columns is None else PartitionSpec(*[None] * columns, axis)

    def states(node) -> bool:
        return hasattr(node, "AXES")

    def spec(node):
        if not states(node):
            return split(WIDTH if len(node.shape) == 5 else None)
        axes = {name: node.AXES[name].columns if name in node.AXES else None for name in node._fields}
        fields = {name: jax.tree.map(lambda _, n=name: split(axes[n]), x) for name, x in node._asdict().items()}
        return type(node)(**fields)

    in_specs = tuple(nothing if i < whole else jax.tree.map(spec, x, is_leaf=states) for i, x in enumerate(args))
    out_specs = jax.tree.map(spec, jax.eval_shape(call, *args), is_leaf=states)
    return jax.shard_map(call, in_specs=in_specs, out_specs=out_specs, axis_names={axis})(*args)


def stripe(x, axis: int):
    """Returns this device's columns of an array that all devices have whole; its axis ``axis`` are the columns."""
    parts, name = _stripes()
    if parts == 1:
        return x
    size = x.shape[axis] // parts
    return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(name) * size, size, axis)


def whole_columns(columns: int) -> int:
    """Returns the columns of the whole frame of which this device sees ``columns``."""
    return columns * _stripes()[0]


def stripe_columns(columns: int) -> int:
    """Returns the columns of this device's stripe of a frame of ``columns``."""
    return columns // _stripes()[0]


def normal(key, shape) -> jax.Array:
    """Draws float32 noise for videos: the same numbers, however they are split."""
    whole = (*shape[:WIDTH], whole_columns(shape[WIDTH]), *shape[WIDTH + 1 :])
    return stripe(jax.random.normal(key, whole, jnp.float32), WIDTH)


def varying(tree):
    """Marks constants as different on every device, as a loop's carry needs them where each has a stripe of its own."""
    parts, axis = _stripes()
    if parts == 1:
        return tree
    return jax.tree.map(lambda x: jax.lax.pcast(x, axis, to="varying"), tree)


def settled(x):
    """Returns ``x``, on TPU computed before what follows.

    libtpu 0.0.51 aborts ("Scaled window bound is not full coverage") when it fuses the modulation of every frame by
    vectors of its own into the head's narrow projection.
    """
    return jax.lax.optimization_barrier(x) if select.device()[0] == "tpu" else x


MEGACORE = ("TPU v4", "TPU v5")  # device kinds of chips whose two cores share every operation; "TPU v5" is a v5p


def settled_on_megacore(x):
    """Returns ``x``, on chips of two cores computed before what follows, and so is its gradient.

    libtpu 0.0.51 and 0.0.52 abort on v5p when a video of 32,760 tokens is whole on a chip: "Scaled dimension has
    non-zero pad high" when a projection is fused with the modulation or gate of every frame by vectors of its own,
    "Cannot find a valid window" when both sums in the gradient of an RMSNorm (over a row, over a column) become one
    fusion. Other chips compile the same without.
    """
    return jax.lax.optimization_barrier(x) if select.device()[1] in MEGACORE else x


def mean_of_stripes(x):
    """Returns the mean over all stripes of what this device computed from its own."""
    parts, axis = _stripes()
    return x if parts == 1 else jax.lax.pmean(x, axis)


def constrain(x, *logical: str | None):
    """Lays ``x`` out by the rules; the identity without a mesh.

    A dimension without a rule, or of a size that does not divide, is whole on every device.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if _parts(mesh, OURS) == 1:
        return x
    rules = [_present(mesh, axes) for axes in RULES.spec(logical)]
    spec = [axes if n % _parts(mesh, axes) == 0 else None for n, axes in zip(x.shape, rules, strict=True)]
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*spec))


def at_rest(tree):
    """Lays gradients out as the parameters they belong to: sums over devices leave every device its own part."""
    mesh = jax.sharding.get_abstract_mesh()
    return tree if _parts(mesh, OURS) == 1 else jax.lax.with_sharding_constraint(tree, specs(tree, mesh))


def attention(
    q_BLNK: Float[Array, "B L N K"],
    k_BSNK: Float[Array, "B S N K"],
    v_BSNK: Float[Array, "B S N K"],
    pattern: Pattern,
    *,
    lengths_Q: Int32[Array, " Q"] | None = None,
    text: bool = False,
    derivative: str = "vjp",
) -> Float[Array, "B L N K"]:
    """Computes ``chunk_attention`` on the ambient mesh: batch and heads split, keys of whole frames gathered.

    Args:
      q_BLNK, k_BSNK, v_BSNK, lengths_Q: see ``chunk_attention``; inside ``split_videos`` this device's.
      pattern: who sees whom; inside ``split_videos`` with the tokens of a stripe as chunks.
      text: keys are text rows, which every device has whole.
      derivative: see ``chunk_attention``.

    Raises:
      UserError: heads that do not divide by their mesh axis.
    """
    parts, axis = _stripes()
    if parts > 1 and text:
        k_BSNK, v_BSNK = varying((k_BSNK, v_BSNK))
    elif parts > 1:
        # A chunk's keys arrive stripe after stripe instead of row after row. Softmax does not care about the order of
        # keys within a chunk, and they are rotated already.
        k_BSNK, v_BSNK = (_gather(x, pattern.k_chunk, axis) for x in (k_BSNK, v_BSNK))
        pattern = dataclasses.replace(pattern, k_chunk=pattern.k_chunk * parts)
    call = functools.partial(_local, pattern, derivative)
    lengths = () if lengths_Q is None else (lengths_Q,)
    mesh = jax.sharding.get_abstract_mesh()
    free = _present(mesh, mesh.axis_names)
    if _parts(mesh, free) == 1:
        return call(q_BLNK, k_BSNK, v_BSNK, *lengths)
    check_heads(mesh, q_BLNK.shape[2])
    backend = select.choose(None, q_BLNK, pattern, derivative=derivative, function="attention")
    if backend.partitionable:
        q_BLNK, k_BSNK, v_BSNK = (constrain(x, "batch", None, "heads", None) for x in (q_BLNK, k_BSNK, v_BSNK))
        return constrain(call(q_BLNK, k_BSNK, v_BSNK, *lengths), "batch", None, "heads", None)
    # A kernel is opaque to the compiler, which would gather its inputs on every device; under shard_map each device
    # calls it on its own examples and heads. Parameters are made with one example, which is not split.
    batch = None if q_BLNK.shape[0] % _parts(mesh, RULES.batch) else _present(mesh, RULES.batch)
    spec = PartitionSpec(batch, None, _present(mesh, RULES.heads), None)
    specs_in = (spec, spec, spec) + (PartitionSpec(),) * len(lengths)
    forward = jax.shard_map(call, in_specs=specs_in, out_specs=spec, axis_names=set(free))
    if parts == 1:
        return forward(q_BLNK, k_BSNK, v_BSNK, *lengths)
    # Inside of stripes this shard_map is nested in that of ``split_videos``, see ``_nested``.
    backward = functools.partial(_local_gradient, call)
    backward = jax.shard_map(backward, in_specs=(spec, *specs_in), out_specs=(spec,) * 3, axis_names=set(free))
    return _nested(forward, backward, q_BLNK, k_BSNK, v_BSNK, *lengths)


def _local(pattern: Pattern, derivative: str, q, k, v, *lengths):
    return chunk_attention(q, k, v, pattern, lengths_Q=lengths[0] if lengths else None, derivative=derivative)


def _local_gradient(call, g, q, k, v, *lengths):
    return jax.vjp(lambda *qkv: call(*qkv, *lengths), q, k, v)[1](g)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _nested(forward, backward, *inputs):
    """``forward(*inputs)`` with ``backward(cotangent, *inputs)`` as its gradient, which repeats the forward pass.

    jax 0.10.2 splits a nested ``shard_map`` under remat into forward and backward pass with residuals laid out over all
    mesh axes, those of the outer one included, and cannot lower that; so nothing but the inputs goes between them.
    """
    return forward(*inputs)


def _nested_forward(forward, backward, *inputs):
    return forward(*inputs), inputs


def _nested_backward(forward, backward, inputs, g):
    return *backward(g, *inputs), *(None for _ in inputs[3:])  # lengths have no gradient


_nested.defvjp(_nested_forward, _nested_backward)


def _gather(x_BSNK, chunk: int, axis: str):
    chunks = rearrange(x_BSNK, "b (c s) n k -> b c s n k", s=chunk)
    return rearrange(jax.lax.all_gather(chunks, axis, axis=2, tiled=True), "b c s n k -> b (c s) n k")
