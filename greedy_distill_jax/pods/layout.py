"""Where every array of a job lies, as lines to read."""

from collections.abc import Iterator

from greedy_distill_jax.distribution.sharding import leaf_paths
from greedy_distill_jax.pods.jobs import Job, device_bytes


def layout_lines(job: Job, name: str) -> Iterator[str]:
    """Yields every leaf of a job with its layout and its bytes on one device, and the sums of the trees.

    Args:
      job: on described devices.
      name: of their slice.
    """
    yield f"{name}: {job.mesh.size} chips, mesh {dict(job.mesh.shape)}"
    for tree, (shapes, layout) in job.trees.items():
        for (path, leaf), (_, placed) in zip(leaf_paths(shapes), leaf_paths(layout), strict=True):
            size = device_bytes(leaf, placed)
            yield f"{tree}/{path}  {leaf.dtype}{list(leaf.shape)}  {placed.spec}  {size} bytes per device"
    for tree, (shapes, layout) in job.trees.items():
        note = " (of state, alone while streaming)" if tree == "params" else ""
        yield f"{tree}{note}: {device_bytes(shapes, layout) / 2**30:.3f} GiB per device"
