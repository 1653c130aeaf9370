"""One collective: who takes part, and the bytes that one device sends.

Bytes are those of a ring algorithm, from the shapes of the operands: (g - 1) x operand for all-gather over groups of g
devices, (g - 1) / g for reduce-scatter and all-to-all, twice that for all-reduce, and the whole operand for
collective-permute.
"""

import dataclasses
import re

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "collective-permute", "all-to-all")
UNREAD = ("ragged-all-to-all", "collective-broadcast")


@dataclasses.dataclass
class Count:
    """Of one kind of operation: instructions in the program, how often they run, and the bytes a device sends.

    sources: the bytes by the operation of the library that they come from, as far as XLA has kept its name.
    """

    instructions: int = 0
    runs: float = 0.0
    bytes: float = 0.0
    sources: dict[str, float] = dataclasses.field(default_factory=dict)

    def add(self, other: "Count", times: float | int = 1) -> None:
        """Includes ``times`` runs of ``other``."""
        self.instructions += other.instructions
        self.runs += times * other.runs
        self.bytes += times * other.bytes
        for source, sent in other.sources.items():
            self.sources[source] = self.sources.get(source, 0.0) + times * sent


def sent_bytes(kind: str, operand: float, group: int) -> float:
    """Returns what one device sends.

    Args:
      kind: of ``KINDS``.
      operand: bytes of what it puts in.
      group: devices that take part together; any number for a collective-permute.
    """
    if kind == "collective-permute":
        return operand
    share = (group - 1) / group
    return operand * {"all-gather": group - 1, "all-reduce": 2 * share}.get(kind, share)


def group_size(attributes: str, devices: int) -> int:
    """Returns how many devices take part in one collective.

    Args:
      attributes: what follows an instruction's operands, with ``replica_groups=`` in one of XLA's three forms:
        "{{0,1},{2,3}}", "[2,2]<=[4]", or "mesh['a'=2,'b'=4] {'a'}".
      devices: of the program: an empty list of groups means all.

    Raises:
      ValueError: another form.
    """
    if "replica_groups=" not in attributes:
        raise ValueError(f"hlo: no replica_groups in {attributes[:120]!r}.")
    groups = attributes.split("replica_groups=", 1)[1]
    if groups.startswith("{}"):
        return devices
    if found := re.match(r"\{(\{[\d,]+\}(?:,\{[\d,]+\})*)\}", groups):
        return max(len(group.split(",")) for group in found[1].strip("{}").split("},{"))
    if found := re.match(r"\[\d+,(\d+)\]<=\[", groups):
        return int(found[1])
    if found := re.match(r"mesh\[([^\]]*)\] ?(?:, ?device_ids=\S+ )?\{([^}]*)\}", groups):
        sizes = {name: int(size) for name, size in re.findall(r"'?(\w+)'?=(\d+)", found[1])}
        size = 1
        for axis in filter(None, (part.strip() for part in found[2].split(","))):
            part = re.fullmatch(r"'?(\w+)'?(?::\(\d+\)(\d+))?", axis)  # "a", or "a:(1)4", a part of it
            if not part or part[1] not in sizes:
                raise ValueError(f"hlo: the axis {axis} of replica_groups={groups[:120]!r} is not understood.")
            size *= int(part[2] or sizes[part[1]])
        return size
    raise ValueError(f"hlo: replica_groups={groups[:120]!r} is in no form that hlo.group_size reads.")
