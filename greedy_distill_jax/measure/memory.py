"""Memory of a compiled program by the compiler's account, and the most that this process has held."""

import resource
from typing import Any

import jax


def program_bytes(compiled: jax.stages.Compiled) -> dict[str, int]:
    """Returns what a compiled program needs on its device, in bytes by part; donated arguments count once."""
    memory = compiled.memory_analysis()
    parts = {
        "arguments": memory.argument_size_in_bytes,
        "outputs": memory.output_size_in_bytes - memory.alias_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "code": memory.generated_code_size_in_bytes,
    }
    return {**parts, "total": sum(parts.values())}


def peak_bytes() -> dict[str, Any]:
    """Returns {"bytes", "source"} of the most memory this process has had in use so far."""
    stats = jax.devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return {"bytes": int(stats["peak_bytes_in_use"]), "source": "device memory in use, peak of the process so far"}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB
    return {"bytes": peak, "source": "resident host memory, peak of the process so far (compilation included)"}
