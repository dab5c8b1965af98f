"""Covering sets: every pair of values of two axes meets in a test, the full product is `slow`."""

from collections.abc import Callable, Sequence
from itertools import combinations, product
from typing import Any

import pytest


def covering(*axes: Sequence[Any], valid: Callable[..., bool] = lambda *values: True) -> list[Any]:
    """Parameters of the full product without the combinations that are not valid; those beyond a
    set that covers all pairs are marked slow.

    The set is chosen greedily: each time the combination with most pairs that are still missing.
    """
    every = [
        places
        for places in product(*(range(len(axis)) for axis in axes))
        if valid(*(axis[i] for axis, i in zip(axes, places, strict=True)))
    ]
    missing = {pair for combination in every for pair in pairs(combination)}
    chosen = set()
    while missing:
        best = max(every, key=lambda combination: len(missing & pairs(combination)))
        missing -= pairs(best)
        chosen.add(best)
    return [
        pytest.param(
            *(axis[i] for axis, i in zip(axes, combination, strict=True)),
            marks=() if combination in chosen else pytest.mark.slow,
        )
        for combination in every
    ]


def pairs(combination: Sequence[int]) -> set[tuple[tuple[int, int], ...]]:
    """Pairs of (axis, value) that meet in a combination."""
    return set(combinations(enumerate(combination), 2))
