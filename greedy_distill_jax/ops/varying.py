"""Over which mesh axes an array differs from device to device, inside ``shard_map``."""

import jax


def varying_axes(x) -> frozenset[str]:
    """The mesh axes over which ``x`` varies; none outside of ``shard_map``."""
    kind = jax.typeof(x)
    return frozenset(kind.vma if hasattr(kind, "vma") else kind.manual_axis_type.varying)  # jax from 0.11 on; before


def varying_as(x, other):
    """``x``, which varies over nothing, as varying over the axes of ``other``."""
    axes = tuple(varying_axes(other))
    return jax.lax.pcast(x, axes, to="varying") if axes else x
