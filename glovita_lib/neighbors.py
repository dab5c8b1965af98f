"""Exact nearest neighbours by blocked matrix products: no N x M matrix, no copy of the features.

Products are quick, but |q - r|^2 computed from them is a small difference of large numbers. So they
only propose candidates, a few more than k, and a bound of their rounding errors says how near any
other reference can be. The distances of the candidates are computed from differences in float64.
Queries whose k nearest the bound leaves open are asked again with float64 products, and what these
leave open with the differences to all references.

N queries, M references, D width, k neighbours, C candidates; n queries and m references of a block.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

Metric = Literal["euclidean", "cosine"]
QUERIES, REFERENCES = 1024, 16384  # of the similarities that exist at a time, 64 MiB
ROWS = 1024  # that are converted to points at a time: room for more is slower to get than to fill
GROUP = 16384  # queries for which a block of references is prepared once
MARGIN = 8  # candidates beside the k, which keep rounding errors apart from the k-th distance
DIFFERENCES = 2**18  # numbers of the differences that exist at a time, 2 MiB, which caches hold
TIE = 1e-10  # relative difference of squared distances from which on float64 tells them apart


def normalized(features: Tensor) -> Tensor:
    """Rows of length 1, (N, D) float64; a row of zeros stays one."""
    points = features.double()
    length = torch.linalg.vector_norm(points, dim=1, keepdim=True)
    return points / torch.where(length > 0, length, 1.0)


def nearest(
    queries: Tensor,
    references: Tensor,
    k: int,
    metric: Metric,
    *,
    exclude_self: bool,
    device: torch.device | None = None,
) -> tuple[Tensor, Tensor]:
    """The k nearest references of every query, nearest first: distances, float64, and indices.

    Euclidean distance |q - r|, or cosine distance 1 - cos(q, r), for which a row of zeros is 1/2
    away from all others. Exact, but that of references which are equally near to float64 any may
    be taken. k is cut to the number of references. With `exclude_self` query i is reference i and
    is left out.

    Args:
        queries: (N, D) of any float type; read in blocks, wherever they are.
        references: (M, D), likewise.
        device: what computes and has the results (N, k); None: where the references are. The CPU
            takes the place of mps, which has no float64.
    """
    device = references.device if device is None else device
    device = torch.device("cpu") if device.type == "mps" else device
    k = max(min(k, len(references) - exclude_self), 0)
    distances = torch.zeros(len(queries), k, dtype=torch.float64, device=device)
    indices = torch.zeros(len(queries), k, dtype=torch.int64, device=device)
    if not distances.numel():
        return distances, indices
    space = space_of(references, metric, device)
    rows = torch.arange(len(queries))
    for propose in (*((by_products,) if products_are_float32() else ()), by_double, by_differences):
        left = []
        for part in rows.split(GROUP):
            own = part.to(device) if exclude_self else None
            points = space.points(queries[part.to(queries.device)])
            near, floor = propose(points, references, space, k, own)
            squared, near = nearest_first(points, references, space, near, own)
            distances[part.to(device)], indices[part.to(device)] = squared[:, :k], near[:, :k]
            last = squared[:, k - 1]
            proven = (last == 0) | (last * (1 - TIE) <= floor)
            left.append(part[~proven.cpu()])
        rows = torch.cat(left)
        if not len(rows):
            break
    # of points of length 1 |q - r|^2 = 2 (1 - cos)
    return (distances / 2 if metric == "cosine" else distances.sqrt_()), indices


def products_are_float32() -> bool:
    """Whether products of float32 matrices are computed as such, not in TF32 or bfloat16, for which
    the bounds would not hold; the setting stays as it is."""
    try:
        return torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # set for some kinds of device only
        return False


# ---------------------------------------------------------------------- points


@dataclass(frozen=True, slots=True)
class Space:
    """Features as points whose Euclidean distances are asked for, float64."""

    metric: Metric
    center: Tensor  # (D,)
    scale: float
    device: torch.device

    def points(self, features: Tensor) -> Tensor:
        """(n, D); for the cosine of length 1."""
        points = features.to(self.device).double()
        if self.metric == "euclidean":
            return points
        return normalized(points)

    def small(self, points: Tensor) -> Tensor:
        """Shifted and scaled, by which no ranking changes: products of small numbers have small
        errors, and those of numbers about 1 stay in the range of float32."""
        return (points - self.center).div_(self.scale)


def space_of(references: Tensor, metric: Metric, device: torch.device) -> Space:
    """The space whose centre and scale are those of the references."""
    nothing = torch.zeros(references.shape[1], dtype=torch.float64, device=device)
    space = Space(metric, nothing, 1.0, device)
    total, square = nothing.clone(), nothing.clone()
    for block in references.split(ROWS):
        total += space.points(block).sum(0)
    space = replace(space, center=total / len(references))
    for block in references.split(ROWS):
        square += space.small(space.points(block)).square().sum(0)
    scale = float(square.sum() / len(references)) ** 0.5
    return replace(space, scale=scale or 1.0)


def nearest_first(
    points: Tensor, references: Tensor, space: Space, near: Tensor, own: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Squared distances of points (n, D) to candidates (n, C), from differences, and the candidates
    by them, then by number; one's own is last."""
    near = near.sort(dim=1).values
    size = max(1, DIFFERENCES // (near.shape[1] * points.shape[1]))
    squared = torch.empty(near.shape, dtype=torch.float64, device=near.device)
    for start in range(0, len(points), size):
        part = slice(start, start + size)
        chosen = near[part].to(references.device)
        delta = space.points(references[chosen.flatten()]).view(*chosen.shape, -1)  # (n, C, D)
        delta -= points[part, None]
        squared[part] = torch.einsum("ncd,ncd->nc", delta, delta)
    if own is not None:
        squared.masked_fill_(near == own[:, None], torch.inf)
    squared, order = squared.sort(dim=1, stable=True)
    return squared, near.gather(1, order)


# ---------------------------------------------------------------------- candidates


def candidates_by_products(
    points: Tensor, references: Tensor, space: Space, k: int, own: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """More than k candidates (n, C) of points (n, D), and a squared distance (n,) below which no
    other reference is, NaN where sums may leave the range of the type.

    For u the unit roundoff, any order of summation and all roundings of q, r and |r|^2 included
    (Higham, Accuracy and Stability of Numerical Algorithms, 3.1), the computed similarity
    s = q r - (1/2 - g) |r|^2 with g = 2 (D + 8) u is wrong by less than g (|q|^2 / 2 + |r|^2), as
    |q| |r| <= (|q|^2 + |r|^2) / 2. So q r - |r|^2 / 2 <= s + g |q|^2 / 2 for every reference, that
    is |q - r|^2 >= (1 - g) |q|^2 - 2 s, and s of the others is at most that of the last candidate.
    """
    queries = space.small(points)
    limits = torch.finfo(dtype)
    g = (points.shape[1] + 8) * limits.eps  # eps is 2 u
    size = min(QUERIES, len(points)) * min(REFERENCES, len(references))
    room = torch.empty(size, dtype=dtype, device=points.device)  # fresh pages cost as much as sums

    def prepare(block: Tensor) -> Tensor:
        small = space.small(block)
        bias = (g - 0.5) * small.square().sum(1, keepdim=True)
        return torch.cat([small, bias], 1).to(dtype)  # (m, D + 1)

    def similarity(q: Tensor, r: Tensor) -> Tensor:
        return torch.mm(q, r.T, out=room[: len(q) * len(r)].view(len(q), len(r)))

    with_one = torch.nn.functional.pad(queries, (0, 1), value=1.0).to(dtype)  # takes the bias
    near, last = most_similar(with_one, references, space, k, own, prepare, similarity)
    underflow = 2 * (points.shape[1] + 2) * limits.tiny
    square = queries.square().sum(1)
    floor = (1 - g) * square - 2 * last.double() - underflow
    if near.shape[1] == len(references) - (own is not None):  # there are no others
        floor = torch.full_like(floor, torch.inf)
    floor = torch.where(square < limits.max / 4, floor, torch.nan)  # |r|^2 is at most M
    return near, floor * space.scale**2


by_products = partial(candidates_by_products, dtype=torch.float32)
"""Candidates by float32 products, which are enough for ordinary features."""
by_double = partial(candidates_by_products, dtype=torch.float64)
"""Candidates by float64 products."""


def by_differences(
    points: Tensor, references: Tensor, space: Space, k: int, own: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The nearest (n, C) by differences, for distances of very different size; beyond them nothing
    is left to prove, so the bound is infinite."""

    def similarity(q: Tensor, r: Tensor) -> Tensor:
        return -torch.cdist(q, r, compute_mode="donot_use_mm_for_euclid_dist")

    near, last = most_similar(points, references, space, k, own, lambda r: r, similarity)
    return near, torch.full_like(last, torch.inf)


def most_similar(
    queries: Tensor,
    references: Tensor,
    space: Space,
    k: int,
    own: Tensor | None,
    prepare: Callable[[Tensor], Tensor],
    similarity: Callable[[Tensor, Tensor], Tensor],
) -> tuple[Tensor, Tensor]:
    """The k + MARGIN references (n, C) of the largest similarity, and that of the last one (n,).

    Args:
        own: (n,) the query's number as a reference, which is left out.
        prepare: what is done once to points of references, (m, ...) to (m, ...).
        similarity: (n, m) of a block of queries and prepared references.
    """
    count = min(k + MARGIN, len(references) - (own is not None))
    blocks = queries.split(QUERIES)
    best: dict[int, tuple[Tensor, Tensor]] = {}  # of each block, similarities and references
    for first in range(0, len(references), REFERENCES):
        rows = references[first : first + REFERENCES].split(ROWS)
        prepared = torch.cat([prepare(space.points(part)) for part in rows])
        for number, block in enumerate(blocks):
            similar = similarity(block, prepared)  # (n, m)
            if own is not None:
                place = own[number * QUERIES : number * QUERIES + len(block)] - first
                inside = ((place >= 0) & (place < similar.shape[1])).nonzero().squeeze(1)
                similar[inside, place[inside]] = -torch.inf
            values, found = similar.topk(min(count, similar.shape[1]), dim=1)
            found += first
            if number in best:
                values = torch.cat([best[number][0], values], 1)
                found = torch.cat([best[number][1], found], 1)
                values, chosen = values.topk(min(count, values.shape[1]), dim=1)
                found = found.gather(1, chosen)
            best[number] = values, found
    near = torch.cat([found for _, found in best.values()])
    last = torch.cat([values[:, -1] for values, _ in best.values()])
    return near, last
