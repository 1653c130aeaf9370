"""Whether a training fits its mesh and its processes."""

from jax.sharding import Mesh

from greedy_distill_jax.config.settings import Settings
from greedy_distill_jax.distribution.mesh import batch_parts, feeding
from greedy_distill_jax.distribution.parallel import check_columns, check_heads
from greedy_distill_jax.errors import UserError


def check_mesh(settings: Settings, mesh: Mesh, latent_shape, processes: int = 1) -> None:
    """Raises UserError when batch, microbatches, frames or heads do not divide over the mesh."""
    check_columns(mesh, latent_shape[2] // settings.wan.patch)
    for wan in settings.kind.sizes(settings):
        check_heads(mesh, wan.num_heads)
    batch, count, parts = settings.data.batch, settings.data.accumulate, batch_parts(mesh)
    if not (shares := feeding(parts, 0, processes)[1]):
        raise UserError(
            f"the mesh has {parts} data and fsdp parts, which do not divide over the {processes} processes, nor these "
            f"over them; choose another config.mesh."
        )
    if shares < processes and settings.data.max_bad_records:
        raise UserError(
            f"config.data.max_bad_records is {settings.data.max_bad_records}, but with {parts} data and fsdp parts "
            f"over {processes} processes several feed the same part, and one of them that skipped a record which the "
            f"others read would train on other data; set it to 0, or make config.mesh.context or config.mesh.tensor "
            f"smaller."
        )
    if batch % (parts * count):
        raise UserError(
            f"config.data.batch is {batch}; it must divide over the {parts} data and fsdp parts of the mesh, times "
            f"config.data.accumulate = {count}. Change config.data.batch, config.data.accumulate or config.mesh."
        )
