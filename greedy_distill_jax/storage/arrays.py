"""How orbax stores the arrays of a checkpoint."""

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint._src.metadata.array_metadata_store import Store  # orbax gives its own handler one, and no name

# Where every device holds the whole of an array, orbax lets each write a part of it. Cutting the parts out is a program
# per shape and device to compile, 0.04 s each, and one more file chunk each: only parts of this size are worth it.
_PART_BYTES = 2**20

HANDLERS = ocp.type_handlers.create_type_handler_registry(
    (np.ndarray, ocp.type_handlers.NumpyHandler()),
    (
        jax.Array,
        ocp.type_handlers.ArrayHandler(
            min_slice_bytes_for_replica_parallel=_PART_BYTES,
            array_metadata_store=Store(),  # with which processes check that they wrote the same arrays
        ),
    ),
)
