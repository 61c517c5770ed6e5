"""A small number of cases that contain every pair of values of any two options."""

import random
from collections.abc import Mapping, Sequence
from itertools import combinations, product
from typing import Any


def pairwise(options: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Return cases that cover all pairs, always the same ones.

    The search is greedy, like AETG (Cohen et al., 1997): each case covers most of the pairs that are left. Ties are
    broken at random, so that combinations of more options are mixed, too.
    """
    names, chance = list(options), random.Random(0)
    left = {
        ((a, i), (b, j))
        for a, b in combinations(range(len(names)), 2)
        for i, j in product(range(len(options[names[a]])), range(len(options[names[b]])))
    }
    cases = []
    while left:
        chosen: dict[int, int] = dict(min(left))
        for name in range(len(names)):
            if name not in chosen:
                values = range(len(options[names[name]]))
                chosen[name] = max(values, key=lambda value: (_covered(chosen, name, value, left), chance.random()))
        left -= {(a, b) for a, b in combinations(sorted(chosen.items()), 2)}
        cases.append({names[name]: options[names[name]][value] for name, value in sorted(chosen.items())})
    return cases


def _covered(chosen: Mapping[int, int], name: int, value: int, left: set[Any]) -> int:
    return sum(tuple(sorted([(name, value), other])) in left for other in chosen.items())
