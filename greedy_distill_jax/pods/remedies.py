"""What to change when a step does not fit."""

from greedy_distill_jax.distribution.mesh import batch_parts
from greedy_distill_jax.distribution.sharding import RULES
from greedy_distill_jax.pods import topologies
from greedy_distill_jax.pods.compile_step import Compiled
from greedy_distill_jax.pods.jobs import STREAM, Job, hosts
from greedy_distill_jax.pods.topologies import GIB


def remedies(job: Job, name: str, done: Compiled) -> list[str]:
    """Returns what to change when a step does not fit, the cheapest first.

    Args:
      name: of the slice.
      done: the step.
    """
    c, mesh, wan = job.settings, job.mesh.shape, job.settings.wan
    copies, stripes, split = RULES.batch[0], RULES.columns[0], RULES.embed[0]
    share = c.data.batch // c.data.accumulate // batch_parts(job.mesh)
    columns = job.latent_shape[2] // wan.patch
    compiled, options = done.seconds is not None, []  # else what is kept is too much, however little a step computes
    trained = compiled and done.name != STREAM
    if trained and wan.remat != "full":
        options.append("config.model.remat=full")
    if trained and share > 1:
        options.append(f"config.data.accumulate={c.data.accumulate * share} (microbatch of 1 instead of {share})")
    if mesh[copies] > 1:
        options.append(f"config.mesh.{copies}=1 with config.mesh.{split}=-1 (parameters and moments over all devices)")
    # Streams are not split into stripes; hosts feed as many groups of devices each, or share them evenly.
    for n in range(mesh[stripes] + 1, columns + 1) if trained else ():
        groups, rest = divmod(job.mesh.size, n * mesh[RULES.heads[0]])
        uneven = groups % hosts(job.mesh) and hosts(job.mesh) % groups
        if rest or columns % n or groups % mesh[copies] or uneven or c.data.batch % groups:
            continue
        adjusted = c.data.batch // groups
        also = "" if c.mesh[split] == -1 else f" with config.mesh.{split}=-1"
        also += f" with config.data.accumulate={adjusted}" if adjusted != c.data.accumulate else ""
        options.append(f"config.mesh.{stripes}={n}{also} (activations of a video over more devices)")
        break
    larger = topologies.larger(name)
    if not compiled:  # what is kept is split over all chips, at best
        room = (x for x in larger if done.memory["held"] * job.mesh.size <= done.hbm * topologies.chips(x))
        larger = list(room)
    slice_ = f"a larger slice, such as {larger[0]}" if larger else "chips with more memory"
    options.append(f"{slice_} (missing per device: {done.shortfall / GIB:.2f} GiB)")
    return options
