"""Whether a training fits its mesh and its processes."""

from jax.sharding import Mesh

from greedy_distill_jax.config.settings import Settings
from greedy_distill_jax.distribution.mesh import batch_parts, feeding
from greedy_distill_jax.distribution.parallel import check_columns, check_heads
from greedy_distill_jax.errors import UserError


def check_mesh(settings: Settings, mesh: Mesh, latent_shape) -> None:
    """Raises UserError when batch, microbatches, frames, heads or processes do not divide over the mesh."""
    check_columns(mesh, latent_shape[2] // settings.wan.patch)
    for wan in settings.kind.sizes(settings):
        check_heads(mesh, wan.num_heads)
    feeding(mesh)
    batch, count, parts = settings.data.batch, settings.data.accumulate, batch_parts(mesh)
    if batch % (parts * count):
        raise UserError(
            f"config.data.batch is {batch}; it must divide over the {parts} data and fsdp parts of the mesh, times "
            f"config.data.accumulate = {count}. Change config.data.batch, config.data.accumulate or config.mesh."
        )
