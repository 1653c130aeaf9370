"""Over which mesh axes an array differs from device to device, inside ``shard_map``."""

import jax


def varying_axes(x) -> frozenset[str]:
    """The mesh axes over which ``x`` varies; none outside of ``shard_map``."""
    return frozenset(jax.typeof(x).manual_axis_type.varying)


def varying_alike(*arrays):
    """The arrays, marked as varying over the mesh axes of all of them, so that jax sums a cotangent over the others."""
    axes = frozenset().union(*map(varying_axes, arrays))
    return tuple(_cast(x, axes - varying_axes(x)) for x in arrays)


def varying_as(x, other):
    """``x``, which varies over nothing, as varying over the axes of ``other``."""
    return _cast(x, varying_axes(other))


def _cast(x, axes: frozenset[str]):
    return jax.lax.pcast(x, tuple(axes), to="varying") if axes else x


def summed_as(x, like):
    """Sums a hand-written cotangent ``x`` over the axes where ``like``, what it belongs to, is the same on all devices.

    Differentiation by jax does so by itself.
    """
    over = tuple(varying_axes(x) - varying_axes(like))
    return jax.lax.psum(x, over) if over else x
