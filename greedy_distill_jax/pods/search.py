"""The smallest slice of a generation of chips that a job fits on."""

from collections.abc import Callable, Iterator
from typing import Any

from greedy_distill_jax.config import Settings
from greedy_distill_jax.errors import UserError
from greedy_distill_jax.pods import jobs, topologies
from greedy_distill_jax.pods.goodput import Faults
from greedy_distill_jax.pods.report import report


def search(
    settings: Settings,
    generation: str,
    size: str,
    only: str,
    say: Callable[[str], None],
    faults: Faults | None = None,
) -> Iterator[dict[str, Any]]:
    """Compiles a job for one slice after the other, the smallest first, up to the first that it fits on.

    The global batch stays, and every group of devices takes one video at a time.

    Args:
      settings, size, only: as for ``jobs.build_job``.
      generation: a key of ``topologies.CHIPS``.
      say: takes one line.
      faults: as for ``report``.

    Yields:
      The record of every slice that the job could have, as ``report`` returns it; the last one says whether it fits.

    Raises:
      UserError: no such generation (field "topology"), or what no slice could mend.
    """
    if generation not in topologies.CHIPS:
        raise UserError(
            f"{generation!r} is no generation of chips; a search takes one of {', '.join(topologies.CHIPS)}",
            "topology",
        )
    jobs.build_networks(settings, size, only)  # what no slice could mend is said once
    say(f"global batch {settings.data.batch}, on every slice one video at a time per group of devices")
    for slice_ in topologies.CHIPS[generation].slices:
        name = f"{generation}:{slice_}"
        try:
            record = report(settings, name, size, only, say, faults, search=True)
        except jobs.Misfit as error:
            say(f"{name}: {error}")
            continue
        yield record
        if record["fits"]:
            accumulate = record["facts"]["accumulate"]
            say(f"smallest slice of {generation} that fits: {name}, with --config.data.accumulate={accumulate}")
            return
    say(f"none of these slices of {generation} fits")
