"""Bags of instances, packed: the rows of all bags one below the other, without padding.

Lengths are known on the CPU, so that nothing here waits for the device. B bags, N instances of a
padded bag, M instances of all bags, D width, K branches or classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from glovita_lib.errors import UserError

LONG = 64  # mean rows per bag from which one matrix product per bag beats row-wise operations


@dataclass(frozen=True, eq=False)
class Bags:
    """A batch of bags of any lengths."""

    features: Tensor  # (M, D), any float dtype
    lengths: Tensor  # (B,) int64 on the CPU, each at least 1, M in sum

    def __post_init__(self) -> None:
        if self.features.ndim != 2:
            raise UserError(
                f"features of bags have shape {tuple(self.features.shape)}; packed bags are (M, D)"
            )
        lengths = self.lengths
        if lengths.device.type != "cpu" or lengths.dtype != torch.int64 or lengths.ndim != 1:
            raise TypeError("lengths of bags are (B,) int64 on the CPU")
        if (lengths < 1).any():
            empty = int((lengths < 1).nonzero()[0])
            raise UserError(f"bag {empty} of the batch is empty; leave bags without instances out")
        if int(lengths.sum()) != len(self.features):
            raise UserError(
                f"bags of {int(lengths.sum())} instances in sum, but {len(self.features)} rows of"
                " features"
            )

    @classmethod
    def from_list(cls, bags: Sequence[Tensor]) -> "Bags":
        """Bags [(N_b, D), ...], each with at least one instance."""
        return cls(torch.cat(tuple(bags)), torch.tensor([len(bag) for bag in bags]))

    @classmethod
    def from_padded(cls, features: Tensor, mask: Tensor | None) -> "Bags":
        """Padded (B, N, D) with mask (B, N), true where an instance is; without a mask all are.

        Without a mask this is a view; with one that lies on a GPU it waits for the device once.
        """
        bags, instances, width = features.shape
        if mask is None:
            return cls(features.reshape(-1, width), torch.full((bags,), instances))
        if mask.shape != features.shape[:2]:
            raise UserError(
                f"a mask of shape {tuple(mask.shape)} for padded bags of {tuple(features.shape)};"
                " the mask is (B, N) for features (B, N, D)"
            )
        mask = mask.bool()
        return cls(features[mask.to(features.device)], mask.sum(1).cpu())

    def to_padded(self) -> tuple[Tensor, Tensor]:
        """Features (B, N, D) with zeros behind each bag, mask (B, N), N the longest bag."""
        return self.pad(self.features, 0.0), self.mask

    def pad(self, values: Tensor, fill: float) -> Tensor:
        """Values (M, ...) of the instances -> (B, N, ...)."""
        padded = values.new_full((len(self), self.longest, *values.shape[1:]), fill)
        padded[self.index, self.position] = values
        return padded

    def __len__(self) -> int:
        return len(self.lengths)

    @cached_property
    def bounds(self) -> list[int]:
        """First row of each bag, and M at the end: B + 1 numbers."""
        return [0, *self.lengths.cumsum(0).tolist()]

    @cached_property
    def longest(self) -> int:
        """Instances of the largest bag."""
        return int(self.lengths.max()) if len(self) else 0

    @cached_property
    def ptr(self) -> Tensor:
        """`bounds` (B + 1,) int64 on the device of the features."""
        return torch.tensor(self.bounds).to(self.features.device, non_blocking=True)

    @cached_property
    def index(self) -> Tensor:
        """Bag of each row, (M,) int64, on the device of the features."""
        counts = self.ptr.diff()
        bags = torch.arange(len(self), device=counts.device)
        return bags.repeat_interleave(counts, output_size=self.bounds[-1])

    @cached_property
    def position(self) -> Tensor:
        """Place of each row within its bag, (M,) int64, on the device of the features."""
        rows = torch.arange(self.bounds[-1], device=self.features.device)
        return rows - self.ptr[self.index]

    @cached_property
    def mask(self) -> Tensor:
        """(B, N) true where a padded bag has an instance."""
        places = torch.arange(self.longest, device=self.features.device)
        return places < self.ptr.diff()[:, None]

    def to(self, device: torch.device | str, non_blocking: bool = True) -> "Bags":
        """The same bags with features on a device."""
        return Bags(self.features.to(device, non_blocking=non_blocking), self.lengths)

    def pin_memory(self) -> "Bags":
        """The same bags in page-locked memory, from which copies to a GPU run beside its work."""
        return Bags(self.features.pin_memory(), self.lengths)

    def split(self, values: Tensor) -> tuple[Tensor, ...]:
        """Values (M, ...) of the instances as one view per bag."""
        return values.split(self.lengths.tolist())

    def span(self, start: int, stop: int) -> "Span":
        """What rows [start, stop) have to do with the bags."""
        first = int(torch.searchsorted(self.ends, start, right=True))
        last = int(torch.searchsorted(self.ends, stop - 1, right=True))
        inner = self.bounds[first + 1 : last + 1]
        return Span(first, [start, *inner, stop], start, self.index[start:stop] - first)

    @cached_property
    def ends(self) -> Tensor:
        """Row behind each bag, (B,) int64 on the CPU."""
        return self.lengths.cumsum(0)

    @cached_property
    def whole(self) -> "Span":
        """The span of all rows."""
        return self.span(0, self.bounds[-1])


class Span:
    """A range of rows and the P bags it touches: sums over instances as matrix products.

    Few long pieces take one product per piece, many short ones row-wise operations; both are exact.
    """

    def __init__(self, first: int, bounds: list[int], start: int, index: Tensor) -> None:
        self.bags = slice(first, first + len(bounds) - 1)  # of the batch
        self.bounds = [bound - start for bound in bounds]  # P + 1 rows relative to the range
        self.index = index  # (R,) piece of each row
        self.pieces = len(bounds) - 1
        self.long = self.bounds[-1] >= LONG * self.pieces
        self.slices = [slice(a, b) for a, b in pairwise(self.bounds)] if self.long else []

    def pool(self, weights: Tensor, rows: Tensor) -> Tensor:
        """sum_i w_ik x_i of each piece: weights (R, K), rows (R, D) -> (P, K, D)."""
        if self.long:
            return torch.stack([weights[s].T @ rows[s] for s in self.slices])
        everything = torch.arange(len(rows), device=rows.device)
        starts = torch.tensor(self.bounds[:-1]).to(rows.device, non_blocking=True)
        sums = [
            torch.nn.functional.embedding_bag(
                everything, rows, starts, mode="sum", per_sample_weights=column.contiguous()
            )
            for column in weights.unbind(1)
        ]
        return torch.stack(sums, 1)

    def dots(self, rows: Tensor, vectors: Tensor) -> Tensor:
        """x_i . v_k of the piece of each row: rows (R, D), vectors (P, K, D) -> (R, K)."""
        if self.long:
            return torch.cat([rows[s] @ v.T for s, v in zip(self.slices, vectors, strict=True)])
        return torch.stack(
            [torch.linalg.vecdot(rows, v[self.index]) for v in vectors.unbind(1)], dim=1
        )

    def spread_(self, out: Tensor, weights: Tensor, vectors: Tensor) -> Tensor:
        """out_i += sum_k w_ik v_k, v of the piece of each row: out (R, D), weights (R, K), vectors
        (P, K, D)."""
        if self.long:
            for s, v in zip(self.slices, vectors, strict=True):
                out[s].addmm_(weights[s], v)
            return out
        for k, v in enumerate(vectors.unbind(1)):
            out.addcmul_(weights[:, k : k + 1], v[self.index])
        return out

    def max(self, values: Tensor) -> Tensor:
        """Largest value of each piece: (R, K) -> (P, K)."""
        index = self.index[:, None].expand_as(values)
        out = values.new_full((self.pieces, values.shape[1]), -torch.inf)
        return out.scatter_reduce(0, index, values, "amax")

    def sum(self, values: Tensor) -> Tensor:
        """Sum over each piece: (R, K) -> (P, K)."""
        out = values.new_zeros((self.pieces, values.shape[1]))
        return out.index_add(0, self.index, values)


def as_bags(inputs: Any) -> Bags:
    """Bags of whatever holds instances.

    Args:
        inputs: Bags; one bag (N, D); padded bags (B, N, D); {"features": (B, N, D), "mask": (B, N)
            or None}; or encoder features, whose patch tokens become instances (CLS and register
            tokens do not).

    Raises:
        UserError: no instances in it, e.g. an encoder that gives one vector per image.
    """
    if isinstance(inputs, Bags):
        return inputs
    if isinstance(inputs, Tensor):
        if inputs.ndim == 2:
            return Bags(inputs, torch.tensor([len(inputs)]))
        if inputs.ndim == 3:
            return Bags.from_padded(inputs, None)
        raise UserError(f"bags of shape {tuple(inputs.shape)}; valid are (N, D) and (B, N, D)")
    if isinstance(inputs, dict):
        return Bags.from_padded(inputs["features"], inputs.get("mask"))
    if inputs.tokens is None:
        raise UserError(
            "this head needs instances, but the encoder gives one vector per sample; take an"
            " encoder with tokens, bags of features, or head_type classification"
        )
    prefix = inputs.n_prefix
    mask = None if inputs.mask is None else inputs.mask[:, prefix:]
    return Bags.from_padded(inputs.tokens[:, prefix:], mask)


def segment_softmax(scores: Tensor, bags: Bags) -> Tensor:
    """exp(a_ik) / sum_j exp(a_jk) over the instances j of the bag of i: (M, K) -> (M, K).

    -inf is weight 0; every bag needs a finite score.
    """
    largest = bags.whole.max(scores.detach())
    weights = (scores - largest[bags.index]).exp()
    return weights / bags.whole.sum(weights)[bags.index]


def segment_order(scores: Tensor, bags: Bags) -> Tensor:
    """Rows of each bag by falling score, in the place of the bag: (M, K) -> rows (M, K) int64.

    Equal scores keep their order, so that results do not depend on the other bags of a batch.
    """
    order = scores.argsort(dim=0, descending=True, stable=True)
    by_bag = bags.index[order].argsort(dim=0, stable=True)
    return order.gather(0, by_bag)


@dataclass(frozen=True, eq=False)
class Chosen:
    """Places in the order of instances that `segment_order` gives: k_b of each bag."""

    places: Tensor  # (S,) int64 places in the order
    bag: Tensor  # (S,) int64 bag of each
    share: Tensor  # (S,) float32: 1 / k_b

    @classmethod
    def first(cls, bags: Bags, counts: Tensor) -> "Chosen":
        """The first counts (B,), on the CPU, of each bag."""
        return cls._at(bags, torch.tensor(bags.bounds[:-1]), counts)

    @classmethod
    def last(cls, bags: Bags, counts: Tensor) -> "Chosen":
        """The last counts (B,), on the CPU, of each bag."""
        return cls._at(bags, bags.ends - counts, counts)

    @classmethod
    def _at(cls, bags: Bags, starts: Tensor, counts: Tensor) -> "Chosen":
        bag = torch.arange(len(bags)).repeat_interleave(counts)
        places = torch.arange(len(bag)) + (starts - counts.cumsum(0) + counts)[bag]
        share = 1 / counts.clamp(min=1)[bag].float()
        device = bags.features.device
        return cls(*(t.to(device, non_blocking=True) for t in (places, bag, share)))


class _Pool(torch.autograd.Function):
    """Span.pool with gradients."""

    @staticmethod
    def forward(ctx: Any, weights: Tensor, rows: Tensor, span: Span) -> Tensor:
        ctx.save_for_backward(weights, rows)
        ctx.span = span
        return span.pool(weights, rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        weights, rows = ctx.saved_tensors
        d_weights = d_rows = None
        if ctx.needs_input_grad[0]:
            d_weights = ctx.span.dots(rows, gradient)
        if ctx.needs_input_grad[1]:
            d_rows = ctx.span.spread_(torch.zeros_like(rows), weights, gradient)
        return d_weights, d_rows, None


def segment_pool(weights: Tensor, rows: Tensor, bags: Bags) -> Tensor:
    """sum_i w_ik x_i of each bag, with gradients: (M, K), (M, D) -> (B, K, D)."""
    dtype = torch.promote_types(weights.dtype, rows.dtype)
    return _Pool.apply(weights.to(dtype), rows.to(dtype), bags.whole)


def segment_max(rows: Tensor, bags: Bags) -> Tensor:
    """Largest value per feature over the instances of each bag: (M, D) -> (B, D)."""
    with torch.autocast(rows.device.type, enabled=False):  # it stacks no float16 among bfloat16
        if bags.whole.long:
            return torch.stack([bag.amax(0) for bag in bags.split(rows)])
        return bags.whole.max(rows)
