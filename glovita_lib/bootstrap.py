"""Percentile bootstrap: intervals of metrics from samples drawn with replacement.

Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13. A resample is not a list
of samples but how often each was drawn, so that one pass over the samples serves many resamples.
N samples, R resamples.
"""

from collections.abc import Callable, Iterator

import numpy as np

from glovita_lib.weighted import Array

ELEMENTS_AT_ONCE = 4_000_000  # weights held at a time: 32 MB


def draws(n: int, resamples: int, seed: int) -> Iterator[Array]:
    """Weights (N, r) of the resamples, in blocks that fit the memory; their sum r is `resamples`.

    Resample i is the i-th draw of n row numbers from the stream of the seed, whatever the blocks.
    """
    stream = np.random.default_rng(seed)
    block = max(1, ELEMENTS_AT_ONCE // max(n, 1))
    for start in range(0, resamples, block):
        rows = range(start, min(start + block, resamples))
        counts = [np.bincount(stream.integers(0, n, n), minlength=n) for _ in rows]
        yield np.ascontiguousarray(np.stack(counts, 1), np.float64)


def intervals(
    measure: Callable[[Array], dict[str, Array]],
    n: int,
    *,
    resamples: int,
    seed: int,
    level: float,
) -> dict[str, tuple[float, float]]:
    """Lower and upper end of the percentile interval of each metric.

    Resamples in which a metric is undefined (no sample of a class was drawn) are left out of its
    interval; it is (NaN, NaN) where none is left, and where fewer than two samples say nothing
    about the spread.

    Args:
        measure: weights (N, r) -> name -> values (r,).
        n: N.
        level: share of the resamples inside, e.g. 0.95.
    """
    blocks = [measure(weights) for weights in draws(n, resamples, seed)]
    tail = 100 * (1 - level) / 2
    found: dict[str, tuple[float, float]] = {}
    for name in blocks[0] if blocks else ():
        values = np.concatenate([block[name] for block in blocks])
        defined = values[~np.isnan(values)]
        if n < 2 or not len(defined):
            found[name] = (float("nan"), float("nan"))
            continue
        low, high = np.percentile(defined, (tail, 100 - tail))
        found[name] = (float(low), float(high))
    return found
