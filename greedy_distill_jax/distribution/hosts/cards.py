"""Which NVIDIA cards of a host one of its processes uses.

Cards are numbered as jax numbers them: from 0 on among the visible ones, whatever numbers CUDA_VISIBLE_DEVICES gives.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from greedy_distill_jax.errors import UserError


class Cards(NamedTuple):
    """own: indices among the visible cards. visible: how many these are. names: of the own ones, as CUDA has them."""

    own: tuple[int, ...]
    visible: int
    names: tuple[str, ...]


def visible_cards(environment: Mapping[str, str], root: Path = Path("/")) -> list[str] | None:
    """Names of the cards that CUDA shows this process, in its order; None where there are none, or jax is not to look.

    ``root`` is the folder of ``proc``.
    """
    platforms = environment.get("JAX_PLATFORMS", "")
    if platforms and not {"cuda", "gpu"} & set(platforms.split(",")):
        return None
    shown = environment.get("CUDA_VISIBLE_DEVICES")
    if shown is None:
        names = [str(number) for number, _ in enumerate(root.glob("proc/driver/nvidia/gpus/*"))]
    else:
        names = []
        for name in shown.replace(" ", "").split(","):
            if not name or name.startswith("-") or name == "NoDevFiles":  # CUDA stops at the first that is none
                break
            names.append(name)
    return names or None


def own_cards(visible: list[str] | None, local: Sequence[int] | None, chosen: str = "") -> Cards | None:
    """The cards of a process: all visible ones, or its part of those that the processes of its host see together.

    Args:
      visible: names of the cards that this process sees; None for none.
      local: number of the process on its host, and how many these are (0 where nobody says, and each takes one); None
        for a process that has all visible ones alone.
      chosen: indices with commas between, as in JAX_LOCAL_DEVICE_IDS; "" leaves the choice to this function.

    Raises:
      UserError: cards that cannot be shared evenly, or that are chosen and not there.
    """
    if visible is None:
        return None
    rank, count = local[:2] if local else (0, 1)
    if chosen:
        own = tuple(int(index) if index.strip().isdecimal() else -1 for index in chosen.split(","))
        if not all(0 <= index < len(visible) for index in own):
            raise UserError(
                f"JAX_LOCAL_DEVICE_IDS is {chosen!r}, but {len(visible)} cards ({', '.join(visible)}) are visible; "
                f"give numbers from 0 to {len(visible) - 1}"
            )
    elif len(visible) == 1:  # a launcher that gives every task its own card shows it that one only
        own = (0,)
    else:
        count = count or len(visible)
        each = len(visible) // count
        if len(visible) % count or rank >= count:
            raise UserError(
                f"{len(visible)} cards ({', '.join(visible)}) are visible to process {rank} of the {count} on this "
                f"host, which cannot share them evenly; start as many as there are cards, or one, or set "
                f"JAX_LOCAL_DEVICE_IDS or CUDA_VISIBLE_DEVICES for each"
            )
        own = tuple(range(rank * each, (rank + 1) * each))
    return Cards(own, len(visible), tuple(visible[index] for index in own))


def cards_alone(environment: Mapping[str, str], root: Path = Path("/")) -> tuple[Cards | None, int]:
    """(cards of a process alone, how many of them jax is to have at least); (None, 0) on a machine without.

    ``root`` is the folder of ``dev`` and ``proc``. Raises UserError as `own_cards`.
    """
    nodes, driver = list(root.glob("dev/nvidia[0-9]*")), list(root.glob("proc/driver/nvidia/gpus/*"))
    if not nodes and not driver:  # CUDA_VISIBLE_DEVICES may be set there all the same
        return None, 0
    cards = own_cards(visible_cards(environment, root), None, environment.get("JAX_LOCAL_DEVICE_IDS", ""))
    if cards is None or not nodes:  # a container that was given no card sees the driver's list of them
        return cards, 0
    # Of cards in parts CUDA shows a process one part.
    parts = list(root.glob("proc/driver/nvidia/capabilities/gpu*/mig/gi*"))
    fewer = parts or environment.get("JAX_CUDA_VISIBLE_DEVICES", "all") != "all"
    return cards, 1 if fewer else len(cards.own)
