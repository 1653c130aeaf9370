"""Looks at the hosts of a job before it trains: the same options as the training, in every process.

    python launch/preflight.py --config=configs/wan1_3b/dmd.py --workdir=runs/stage2 [--devices=8]

Process 0 prints a row per process (devices seen and expected, free memory and disk, clock, whether --workdir is one
folder to all) and a row per axis of the mesh (a sum over its devices: right, and how fast). Exits with 2 when something
is wrong, at all processes, and with 75 when one does not come.
"""

import contextlib
import dataclasses
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from greedy_distill_jax import cli
from greedy_distill_jax.cli.config_flags import load_config
from greedy_distill_jax.config import open_keys, read_settings
from greedy_distill_jax.distribution.agreement import ServiceStore
from greedy_distill_jax.distribution.hosts import alike
from greedy_distill_jax.distribution.hosts.join import Joined, check_joined, join_hosts
from greedy_distill_jax.distribution.mesh import make_mesh
from greedy_distill_jax.errors import UserError
from greedy_distill_jax.measure import preflight
from greedy_distill_jax.training.stop import AgreedStop

FLAGS = {
    "workdir": (str, None, "directory of the run, which all hosts see (required)"),
    "devices": (int, 0, "devices that every process is to have (default: what its launcher gave it; alone, its cards)"),
    "mib": (int, 64, "MiB that every device adds in a sum"),
}


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    config, flags = load_config(sys.argv[1:] if argv is None else argv, FLAGS, open_keys=open_keys())
    if not flags["workdir"]:
        raise UserError("--workdir is missing; name a directory, such as --workdir=runs/teacher.")
    if flags["devices"] < 0 or flags["mib"] < 1:
        raise UserError("--devices must be at least 0 and --mib at least 1")
    settings, folder = read_settings(config), Path(flags["workdir"]).expanduser()
    joined = join_hosts()
    agreeing = contextlib.ExitStack()
    with agreeing:
        if joined.processes > 1:  # what ends one ends all
            agreeing.enter_context(stop := AgreedStop("preflight", joined.process, joined.processes))
            agreeing.enter_context(stop.telling())
        alike.check_start(joined, settings.text, **{"--workdir": str(folder)})
        check_joined()
        expected = max(flags["devices"], joined.expected)
        wrong = _judged(joined, preflight.host_facts(joined, folder, expected), _hosts)
        if not wrong:  # the sums need all devices
            size = flags["mib"] * 2**20
            totals = list(preflight.sums(make_mesh(dataclasses.asdict(settings.mesh)), size))
            wrong = _judged(joined, {"sums": totals}, functools.partial(_sums, size=size))
    if wrong:
        raise UserError(f"preflight: {wrong}")


def _judged(joined: Joined, facts: dict[str, Any], judge: Callable[[list[dict[str, Any]]], str]) -> str:
    """What process 0 finds wrong with the facts of all, at all of them."""
    if joined.processes == 1:
        return judge([facts | {"host": joined.host}])
    store = ServiceStore()
    gathered = alike.gather(joined, store, facts)
    return alike.told(joined, store, None if gathered is None else judge(gathered))


def _hosts(facts: list[dict[str, Any]]) -> str:
    print(preflight.table_of_hosts(facts), flush=True)
    return "; ".join(preflight.problems(facts))


def _sums(facts: list[dict[str, Any]], size: int) -> str:
    sums = [[preflight.Sum(*total) for total in fact["sums"]] for fact in facts]
    if sums[0]:
        print(f"\n{preflight.table_of_sums(sums[0], size)}", flush=True)
    wrong = [(i, total.axis) for i, totals in enumerate(sums) for total in totals if not total.right]
    return "; ".join(f"process {i} ({facts[i]['host']}): the sum over mesh axis {axis} is wrong" for i, axis in wrong)


if __name__ == "__main__":
    cli.run(main)
