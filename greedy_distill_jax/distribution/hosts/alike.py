"""Whether all processes of a job are alike: one version, one code, one configuration, the same data.

Processes that are not would train on, each at its own, or wait in a collective that the others never enter. What each
has goes to process 0 through the store of ``agreement``, before any device is started; its verdict ends all of them.
"""

import hashlib
import json
import re
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

import greedy_distill_jax
from greedy_distill_jax.distribution.agreement import ServiceStore, Store
from greedy_distill_jax.distribution.hosts.join import Joined
from greedy_distill_jax.errors import Lost, UserError
from greedy_distill_jax.storage.versions import versions

_SLICE = 1.0  # seconds of one wait, between which Python sees signals
_NAMED = 3  # differences and processes that a line names
_SHOWN = 60  # characters of a value in a line
_SAME_START = "start all of them with the same installation and the same command"
_SAME_FILES = "let all of them read the same files"


def check_start(joined: Joined, config: str = "{}", **more: Any) -> None:
    """Compares versions, code and configuration of all processes; to be called by all, before devices are started.

    Args:
      joined: this process.
      config: the configuration as JSON.
      **more: what else is to be the same, by name.

    Raises:
      UserError: which process differs in what.
      Lost: one of them does not say.
    """
    if joined.processes == 1:
        return
    # An object that JSON does not hold is told by its address, which is each process's own.
    keys = flat(json.loads(re.sub(r" at 0x[0-9a-f]+", "", config)), "config")
    facts = {f"version of {name}": version for name, version in versions().items()}
    facts |= {"code": digest(Path(greedy_distill_jax.__file__).parent)} | code_of(keys.values())
    _check(joined, facts | keys | more, _SAME_START)


def check_data(joined: Joined, held: Mapping[str, str]) -> None:
    """Compares fingerprints of data, texts and frozen runs, by configuration key; raises as ``check_start``."""
    _check(joined, {f"content of config.{key}": text for key, text in held.items()}, _SAME_FILES)


def check_devices_alike(joined: Joined) -> None:
    """Compares how many devices of which kind each process has, which starts them; raises as ``check_start``."""
    _check(
        joined, {"devices": f"{jax.local_device_count()} x {jax.local_devices()[0].device_kind}"}, "look at its host"
    )


def gather(joined: Joined, store: Store, facts: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """Facts of all processes, in their order, at process 0; None at the others.

    Raises:
      Lost: one of them does not say within ``joined.seconds``.
    """
    store.set(f"facts/{joined.process}", json.dumps({**facts, "host": joined.host}))
    if joined.process:
        return None
    until = time.monotonic() + joined.seconds
    return [json.loads(_wait(joined, store, f"facts/{other}", other, until)) for other in range(joined.processes)]


def told(joined: Joined, store: Store, text: str | None) -> str:
    """The text of process 0, at all processes; the others give None."""
    if text is not None:
        store.set("verdict", text)
        return text
    # Process 0 may wait for another one first.
    return _wait(joined, store, "verdict", 0, time.monotonic() + 2 * joined.seconds)


def difference(facts: Sequence[Mapping[str, Any]]) -> str:
    """One line that names the processes that differ from most, and in what; "" where all have the same.

    Args:
      facts: of all processes, in their order, with "host" beside what is compared.
    """
    names = dict.fromkeys(name for of_process in facts for name in of_process if name != "host")
    found = []
    for name in names:
        values = [json.dumps(of_process.get(name)) for of_process in facts]
        usual = Counter(values).most_common(1)[0][0]  # of two processes the value of process 0
        others = [index for index, value in enumerate(values) if value != usual]
        if others:
            who = ", ".join(f"{index} ({facts[index]['host']})" for index in others[:_NAMED])
            who += f" and {len(others) - _NAMED} more" * (len(others) > _NAMED)
            found.append(f"{name} is {_short(values[others[0]])} at process {who}, {_short(usual)} at the others")
    more = f"; {len(found) - _NAMED} more differences" * (len(found) > _NAMED)
    return "; ".join(found[:_NAMED]) + more


def flat(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a.b": value} of {"a": {"b": value}}; an empty mapping is a value."""
    found = {}
    for key, value in nested.items():
        name = f"{prefix}.{key}" if prefix else key
        found |= flat(value, name) if isinstance(value, Mapping) and value else {name: value}
    return found


def digest(path: Path) -> str:
    """Hash of a file, or of all Python files of a folder."""
    total = hashlib.sha256()
    for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
        content = file.read_bytes()
        total.update(f"{file.relative_to(path)} {len(content)}\n".encode() + content)
    return total.hexdigest()[:12]


def code_of(values: Iterable[Any]) -> dict[str, str]:
    """Hashes of the files of users that values of a configuration name as file.py:NAME."""
    files = {value.rpartition(":")[0] for value in values if isinstance(value, str) and ".py:" in value}
    return {f"code of {file}": digest(Path(file).expanduser()) for file in sorted(files) if Path(file).is_file()}


def _check(joined: Joined, facts: Mapping[str, Any], remedy: str) -> None:
    if joined.processes == 1:
        return
    store = ServiceStore()
    try:
        gathered = gather(joined, store, facts)
        line = told(joined, store, None if gathered is None else difference(gathered))
    except jax.errors.JaxRuntimeError as error:
        raise Lost(f"the service that joins the processes does not answer ({error})") from error
    if line:
        raise UserError(f"{line}; {remedy}")


def _wait(joined: Joined, store: Store, key: str, process: int, until: float) -> str:
    while (left := until - time.monotonic()) > 0:
        if (found := store.get(key, min(_SLICE, left))) is not None:
            return found
    raise Lost(f"process {process} does not say within {joined.seconds} s what it has; look at its output")


def _short(value: str) -> str:
    return value if len(value) <= _SHOWN else f"{value[:_SHOWN]}..."
