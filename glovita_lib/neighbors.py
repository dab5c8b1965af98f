"""Exact nearest neighbours by blocked matrix products: no N x M matrix, any device.

N queries, M references, D width, k neighbours.
"""

from typing import Literal

import torch
from torch import Tensor

Metric = Literal["euclidean", "cosine"]
QUERIES, REFERENCES = 1024, 16384  # of the similarities that exist at a time, 64 MiB


def normalized(features: Tensor) -> Tensor:
    """Rows of length 1, (N, D) float32; a row of zeros stays one."""
    return torch.nn.functional.normalize(features.float(), dim=1)


def nearest(
    queries: Tensor, references: Tensor, k: int, metric: Metric, *, exclude_self: bool
) -> tuple[Tensor, Tensor]:
    """The k nearest references of every query, nearest first: distances and indices, (N, k).

    Euclidean distance |q - r|, or cosine distance 1 - cos(q, r). k is cut to the number of
    references. With `exclude_self` query i is reference i and is left out.
    """
    if metric == "cosine":
        queries, references = normalized(queries), normalized(references)
    else:  # distances do not change under a shift, and small numbers keep their digits
        center = references.float().mean(0)
        queries, references = queries.float() - center, references.float() - center
    k = min(k, len(references) - exclude_self)
    # the largest q r - |r|^2 / 2 belongs to the smallest |q - r|; of unit vectors to both distances
    bias = -0.5 * references.square().sum(1)  # (M,)
    near = [torch.empty(0, k, dtype=torch.int64, device=queries.device)]
    for start in range(0, len(queries), QUERIES):
        block = queries[start : start + QUERIES]
        near.append(most_similar(block, references, bias, k, start if exclude_self else None))
    indices = torch.cat(near)  # (N, k)
    distances = exact_distances(queries, references, indices, metric)
    order = distances.argsort(dim=1, stable=True)
    return distances.gather(1, order), indices.gather(1, order)


def most_similar(
    block: Tensor, references: Tensor, bias: Tensor, k: int, self_start: int | None
) -> Tensor:
    """Indices (b, k) of the references with the largest q r + bias, over blocks of references."""
    best: Tensor | None = None  # (b, k) similarities so far
    found = torch.empty(0)
    for first in range(0, len(references), REFERENCES):
        part = slice(first, first + REFERENCES)
        similarity = torch.addmm(bias[part], block, references[part].T)  # (b, m)
        if self_start is not None:
            own = torch.arange(self_start, self_start + len(block), device=block.device) - first
            inside = (own >= 0) & (own < similarity.shape[1])
            similarity[inside, own[inside]] = -torch.inf
        values, indices = similarity.topk(min(k, similarity.shape[1]), dim=1)
        indices += first
        if best is not None:
            values, indices = torch.cat([best, values], 1), torch.cat([found, indices], 1)
            values, chosen = values.topk(min(k, values.shape[1]), dim=1)
            indices = indices.gather(1, chosen)
        best, found = values, indices
    return found


def exact_distances(queries: Tensor, references: Tensor, indices: Tensor, metric: Metric) -> Tensor:
    """Distances (N, k) to the chosen references, from differences, not from products."""
    parts = [queries.new_empty(0, indices.shape[1])]
    for start in range(0, len(queries), QUERIES):
        near = indices[start : start + QUERIES]
        block = queries[start : start + QUERIES]
        squared = (
            torch.stack(
                [(block - references[near[:, j]]).square().sum(1) for j in range(near.shape[1])], 1
            )
            if near.shape[1]
            else block.new_empty(len(block), 0)
        )
        # of unit vectors |q - r|^2 = 2 (1 - cos)
        parts.append(squared / 2 if metric == "cosine" else squared.sqrt())
    return torch.cat(parts)
