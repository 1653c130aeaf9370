"""Option combinations in which every pair of values occurs: what the option tests run instead of the full product."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any


def pairwise(options: Mapping[str, Sequence[Any]], given: Sequence[Mapping[str, Any]] = ()) -> list[dict[str, Any]]:
    """A small list of full assignments that covers every pair of values of two options (greedy, deterministic).

    Args:
      options: values by name.
      given: full assignments that are run anyway; their pairs need no other.
    """
    names = list(options)
    left = {
        frozenset([(a, x), (b, y)]) for a, b in itertools.combinations(names, 2) for x in options[a] for y in options[b]
    }
    for case in given:
        left -= {frozenset(pair) for pair in itertools.combinations(case.items(), 2)}
    cases = []
    while left:
        case = dict(min(left, key=lambda pair: sorted(map(str, pair))))
        for name in names:
            if name not in case:
                case[name] = max(
                    options[name],
                    key=lambda value: sum(frozenset([(name, value), pair]) in left for pair in case.items()),
                )
        left -= {frozenset(pair) for pair in itertools.combinations(case.items(), 2)}
        cases.append({name: case[name] for name in names})
    return cases
