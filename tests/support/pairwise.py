"""Pairwise combinations: a small set of cases in which all pairs of values of any two options occur."""

import random
from collections.abc import Mapping, Sequence
from itertools import combinations, product
from typing import Any


def pairwise(options: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Return cases that cover all pairs, the same in every call.

    Each case is built greedily to cover most of the pairs that are left, like AETG (Cohen et al., 1997). Ties are
    broken at random, so that combinations of more than two options vary too.
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
