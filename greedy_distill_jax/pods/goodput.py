"""How often a job should save: what saves cost against what faults cost.

References:
  J. W. Young, "A first order approximation to the optimum checkpoint interval", Communications of the ACM 17(9), 1974.
  J. T. Daly, "A higher order estimate of the optimum checkpoint interval for restart dumps", Future Generation Computer
  Systems 22(3), 2006.
"""

import math
from typing import NamedTuple

import jax
import numpy as np

from greedy_distill_jax.errors import UserError
from greedy_distill_jax.pods.jobs import Job, hosts
from greedy_distill_jax.ranges import Positive, complaint

_DAY = 86400.0


class Faults(NamedTuple):
    """What a pod is like.

    host_days: days between two faults of one host; the default is that of 2,048 hosts with 8 H100 each, which met 419
    unexpected interruptions in 54 days ("The Llama 3 Herd of Models", 2024, section 3.3.4).
    write_rate: GB per second that the processes of one host write together.
    restart: seconds from a fault to the next new step.
    """

    host_days: float = 264.0
    write_rate: float = 1.0
    restart: float = 300.0

    def checked(self) -> "Faults":
        """Itself; UserError for a number that cannot be, with the field's name."""
        for name, value in self._asdict().items():
            if wrong := complaint(value, Positive):
                raise UserError(f"it is {value:g}; it must be {wrong}", name)
        return self


def interval(save: float, between: float) -> float:
    """Seconds between two saves that lose least: sqrt(2 save between).

    Args:
      save: seconds that one costs.
      between: seconds between two faults of the job.
    """
    return math.sqrt(2.0 * save * between)


def goodput(every: float, save: float, between: float, restart: float) -> float:
    """Part of the time that is training which stays: 1 - save / every - (every / 2 + restart) / between, at least 0.

    Args:
      every: seconds between two saves.
      save: seconds that one costs.
      between: seconds between two faults of the job; a first order in every and restart over it.
      restart: seconds from a fault to the next new step.
    """
    return max(0.0, 1.0 - save / every - (every / 2.0 + restart) / between)


def saving(job: Job, faults: Faults) -> dict[str, float | int]:
    """Bytes of a checkpoint of a job, and how often to save it; seconds, and a save taken to cost all its writing."""
    leaves, number = jax.tree.leaves(job.trees["state"][0]), hosts(job.mesh)
    size = sum(int(np.prod(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)
    save = size / number / (faults.write_rate * 1e9)
    between = faults.host_days * _DAY / number
    every = interval(save, between)
    return {
        "bytes": size,
        "hosts": number,
        "bytes_per_host": size / number,
        "save": save,
        "between_faults": between,
        "every": every,
        "goodput": goodput(every, save, between, faults.restart),
        **faults._asdict(),
    }
