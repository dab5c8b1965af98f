"""LoRA and its relatives; the low-rank adapter that other methods build on."""

import math
from itertools import accumulate, chain, pairwise
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from glovita_lib.network import RowRange, encoder_of
from glovita_lib.peft_base import (
    Adapter,
    Members,
    TargetWeight,
    apply_peft,
    attach_all,
    base_bias,
    base_weight,
    by_pattern,
    call,
    changed_bias,
    resolve_targets,
)
from glovita_lib.spec_peft import Lora

# ------------------------------------------------------------------------------- the product
#
# A linear map with a frozen weight and low-rank changes to it, without the cost of either.
#
#     y = x (W + sum_i E_i B_i A_i)^T + b
#
# with E_i the placement of part i in the rows of a fused weight. For more rows of x than the rank
# it is cheaper to change the weight than the output: the forward is one matrix product as in the
# frozen layer, and the backward never forms the gradient of W (out, in), only those of A and B,
# through the rank. x is kept once for all parts, the changed weight not at all.
#
# N rows of x, r rank.


def join_factors(
    rows: tuple[RowRange, ...], factors: tuple[Tensor, ...], like: Tensor
) -> list[Tensor]:
    """All parts as one pair: A (R, in) of all ranks below each other, B (out, R) with B_i in its
    rows and columns. One wide product is faster than a skinny one per part."""
    downs, ups = factors[::2], factors[1::2]
    if len(rows) == 1 and rows[0] == (0, like.shape[0]):
        return [downs[0].to(like.dtype), ups[0].to(like.dtype)]
    up = like.new_zeros(like.shape[0], sum(u.shape[1] for u in ups))  # (out, R)
    for (start, end), columns, part in zip(rows, spans(ups), ups, strict=True):
        up[start:end, columns] = part.to(like.dtype)
    return [torch.cat(downs).to(like.dtype), up]  # (R, in), (out, R)


def spans(ups: tuple[Tensor, ...]) -> list[slice]:
    """Columns of each part in the joined B."""
    ends = list(accumulate(u.shape[1] for u in ups))
    return [slice(a, b) for a, b in pairwise([0, *ends])]


class LowRankLinear(torch.autograd.Function):
    """The map above and its gradients with respect to x, b, A and B.

    With h = x A^T (N, R) and g the gradient of y (N, out):
        dB = g^T h,  dA = (g B)^T x,  dx = g (W + B A),  db = sum of g over N.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        rows: tuple[RowRange, ...],
        *factors: Tensor,
    ) -> Tensor:
        ctx.rows, ctx.has_bias = rows, bias is not None
        ctx.save_for_backward(x, weight, *factors)
        down, up = join_factors(rows, factors, weight)
        changed = torch.addmm(weight, up, down).to(x.dtype)  # (out, in)
        y = F.linear(x, changed, None if bias is None else bias.to(x.dtype))  # (..., out)
        # of three axes or more it is a view, which what follows could not change in place
        return torch.ops.aten._unsafe_view(y, y.shape)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, *factors = ctx.saved_tensors
        down, up = join_factors(ctx.rows, tuple(factors), weight)
        flat = g.flatten(0, -2)  # (N, out)
        gx = None
        if ctx.needs_input_grad[0]:
            # W + B A again rather than kept: it is as large as the frozen weight itself
            gx = (flat @ torch.addmm(weight, up, down).to(g.dtype)).view(x.shape)  # (..., in)
        gb = flat.sum(0) if ctx.has_bias and ctx.needs_input_grad[2] else None
        x = x.flatten(0, -2)  # (N, in)
        # with N last the skinny products are two to five times faster on a CPU
        low = up.to(g.dtype).t().contiguous() @ flat.t()  # (R, N)
        down_grad = (low @ x).to(down.dtype)  # (R, in)
        up_grad = ((down.to(g.dtype) @ x.t()) @ flat).t().to(up.dtype)  # (out, R)
        grads: list[Tensor] = []
        for (start, end), columns in zip(ctx.rows, spans(tuple(factors[1::2])), strict=True):
            grads += [down_grad[columns], up_grad[start:end, columns]]
        return gx, None, gb, None, *grads


def low_rank_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: tuple[RowRange, ...],
    factors: tuple[Tensor, ...],
) -> Tensor:
    """y (..., out) of x (..., in); in autocast's type where autocast is on.

    Args:
        weight: (out, in), must not require a gradient.
        rows: first row and end per part.
        factors: A_1 (r, in), B_1 (rows, r), A_2, ...
    """
    assert not weight.requires_grad, "the base weight of a low-rank change is frozen"
    device = x.device.type
    if torch.is_autocast_enabled(device):
        x = x.to(torch.get_autocast_dtype(device))
    if x.ndim == 1:
        return LowRankLinear.apply(x[None], weight, bias, rows, *factors)[0]
    return LowRankLinear.apply(x, weight, bias, rows, *factors)


# -------------------------------------------------------------------------------------- LoRA
#
# With DoRA, rsLoRA, LoRA+ and PiSSA.
#
# r rank, N rows. A convolution's weight is read as the matrix (out, in * kernel).


class LowRank(Adapter):
    """W + B A with A (r, in) and B (out, r)."""

    dropout: float

    def factors(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """A and B with every scale in them, for the base weight (out, in, *kernel)."""
        raise NotImplementedError

    def start(self, weight: Tensor) -> Tensor:
        """What the change is added to."""
        return weight

    def merged_weight(self, weight: Tensor) -> Tensor:
        """W + B A."""
        down, up = self.factors(weight)
        return self.start(weight) + (up @ down).view(weight.shape)

    def read_weight(self, weight: Tensor) -> Tensor:
        """The changed weight; in training a feature is dropped for the whole batch, as the samples
        are not seen here."""
        if not (self.training and self.dropout):
            return self.merged_weight(weight)
        down, up = self.factors(weight)
        down = down * F.dropout(down.new_ones(down.shape[1]), self.dropout)  # (r, in)
        return self.start(weight) + (up @ down).view(weight.shape)

    @classmethod
    def run(cls, x: Tensor, layer: nn.Module, members: Members[Self]) -> Tensor:
        """The layer with its changes, the gradient of the full weight never formed."""
        weight = started(layer, members)
        return changed_output(x, layer, members, weight, changed_bias(layer))

    def dropped(self, x: Tensor) -> Tensor:
        """The input of A."""
        return F.dropout(x, self.dropout, self.training)


def row_range(layer: nn.Module, rows: RowRange | None) -> RowRange:
    """Rows of a member; all rows for the whole weight."""
    return rows or (0, base_weight(layer).shape[0])


def started(layer: nn.Module, members: Members[LowRank]) -> Tensor:
    """The base weight with every member's start in its rows."""
    base = base_weight(layer)
    pieces: list[Tensor] = []
    end = 0
    for rows, adapter in members:
        first, last = row_range(layer, rows)
        part = base[first:last]
        moved = adapter.start(part)
        if moved is not part:
            pieces += [base[end:first], moved]
            end = last
    return torch.cat([*pieces, base[end:]]) if pieces else base


def changed_output(
    x: Tensor, layer: nn.Module, members: Members[LowRank], weight: Tensor, bias: Tensor | None
) -> Tensor:
    """Output of a Linear layer or convolution with `weight` and the members' low-rank changes."""
    pairs = [(row_range(layer, rows), adapter) for rows, adapter in members]
    dropping = any(a.training and a.dropout > 0 for _, a in pairs)
    if isinstance(layer, _ConvNd):
        return changed_convolution(x, layer, pairs[0][1], weight, bias)
    found = [a.factors(base_weight(layer, rows)) for rows, a in pairs]
    if not dropping:
        factors = tuple(chain.from_iterable(found))
        return low_rank_linear(x, weight, bias, tuple(rows for rows, _ in pairs), factors)
    y = F.linear(x, weight, bias)  # (..., out)
    for ((first, last), adapter), (down, up) in zip(pairs, found, strict=True):
        change = F.linear(F.linear(adapter.dropped(x), down), up)  # (..., rows of the member)
        around = (first, y.shape[-1] - last)  # not added in place: y may be a view of a leaf
        y = y + (F.pad(change, around) if any(around) else change)
    return y


def changed_convolution(
    x: Tensor, layer: _ConvNd, adapter: LowRank, weight: Tensor, bias: Tensor | None
) -> Tensor:
    """A convolution to r channels and one of a single voxel beside the frozen one; with groups the
    weight itself is changed, since the factors mix groups."""
    down, up = adapter.factors(base_weight(layer))
    if layer.groups > 1:
        change = (up @ down).view(weight.shape)  # (out, in / groups, *kernel)
        if adapter.training and adapter.dropout:
            return call(layer, x, weight, bias) + call(layer, adapter.dropped(x), change, None)
        return call(layer, x, weight + change, bias)
    y = call(layer, x, weight, bias)  # (B, out, ...)
    low = call(layer, adapter.dropped(x), down.view(-1, *weight.shape[1:]), None)  # (B, r, ...)
    conv = (F.conv1d, F.conv2d, F.conv3d)[weight.ndim - 3]
    return y.add_(conv(low, up.view(*up.shape, *[1] * (weight.ndim - 2))))


class LoraAdapter(LowRank):
    """s B A with s = alpha / r, or alpha / sqrt(r) (rsLoRA)."""

    A_0: Tensor  # start of A and B, for PiSSA
    B_0: Tensor

    def __init__(self, spec: Lora, weight: Tensor, rank: int) -> None:
        super().__init__()
        out, width = weight.flatten(1).shape
        self.scale = spec.alpha / (math.sqrt(rank) if spec.use_rslora else rank)
        self.dropout = spec.dropout
        self.A = nn.Parameter(torch.empty(rank, width))
        self.B = nn.Parameter(torch.zeros(out, rank))
        vars(self.B)["lr_scale"] = spec.lora_plus_ratio  # for `optim.parameter_groups`
        self.anchored = spec.init_lora_weights == "pissa"
        if self.anchored:
            self.start_from_singular_vectors(weight.flatten(1))
        elif spec.init_lora_weights == "gaussian":
            nn.init.normal_(self.A, std=1 / rank)
        else:
            nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    @torch.no_grad()
    def start_from_singular_vectors(self, weight: Tensor) -> None:
        """s B A = the main part of W; what was there at the start is subtracted for good."""
        left, values, right = torch.linalg.svd(weight.float(), full_matrices=False)
        rank = min(self.A.shape[0], len(values))
        root = (values[:rank] / self.scale).sqrt()  # (r,), half of each value on either side
        self.A.zero_()
        self.A[:rank] = root[:, None] * right[:rank]
        self.B[:, :rank] = left[:, :rank] * root
        self.register_buffer("A_0", self.A.detach().clone())
        self.register_buffer("B_0", self.B.detach().clone())

    def factors(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """A and s B."""
        return self.A, self.B * self.scale

    def start(self, weight: Tensor) -> Tensor:
        """W, for PiSSA W - s B_0 A_0."""
        if not self.anchored:
            return weight
        return weight - self.scale * (self.B_0 @ self.A_0).view(weight.shape)


class DoraAdapter(LoraAdapter):
    """m (W + s B A) / |W + s B A| by rows, the norm outside the gradient (section 4.3)."""

    def __init__(self, spec: Lora, weight: Tensor, rank: int) -> None:
        super().__init__(spec, weight, rank)
        self.m = nn.Parameter(weight.flatten(1).norm(dim=1))

    def gain(self, weight: Tensor) -> Tensor:
        """m / |W + s B A|, one per row (out,)."""
        with torch.no_grad():
            norm = super().merged_weight(weight).flatten(1).norm(dim=1)  # (out,)
        return self.m / norm

    def merged_weight(self, weight: Tensor) -> Tensor:
        """The rows with their trained norms."""
        return self.gains_of(weight) * super().merged_weight(weight)

    def read_weight(self, weight: Tensor) -> Tensor:
        """The rows with their trained norms, with dropout in training."""
        changed = super().read_weight(weight)
        return self.gains_of(weight) * changed if self.training and self.dropout else changed

    def gains_of(self, weight: Tensor) -> Tensor:
        """`gain` in the shape of a factor of the weight."""
        return self.gain(weight).view(-1, *[1] * (weight.ndim - 1))

    @classmethod
    def run(cls, x: Tensor, layer: nn.Module, members: Members[Self]) -> Tensor:
        """The low-rank output times the gain, then the bias."""
        y = changed_output(x, layer, members, started(layer, members), None)
        gain = cls.gains(layer, members).to(y.dtype)  # (out,)
        bias = base_bias(layer)
        if isinstance(layer, _ConvNd):
            shape = (-1, *[1] * (base_weight(layer).ndim - 2))
            gain = gain.view(shape)  # (out, 1, ...)
            bias = None if bias is None else bias.view(shape)
        return y * gain if bias is None else torch.addcmul(bias.to(y.dtype), y, gain)

    @staticmethod
    def gains(layer: nn.Module, members: "Members[DoraAdapter]") -> Tensor:
        """Gain of every row; 1 where no member is."""
        pieces: list[Tensor] = []
        end = 0
        weight = base_weight(layer)
        for rows, adapter in members:
            first, last = row_range(layer, rows)
            pieces += [weight.new_ones(first - end), adapter.gain(weight[first:last])]
            end = last
        return torch.cat([*pieces, weight.new_ones(weight.shape[0] - end)])  # (out,)


@apply_peft.register
def apply_lora(spec: Lora, model: nn.Module) -> None:
    """Freeze the encoder and put a LoRA adapter on every target."""
    root = encoder_of(model)
    targets = resolve_targets(root, spec.targets, allowed=("linear", "conv"))
    ranks = by_pattern(spec.rank_pattern, targets, spec.rank)
    kind = DoraAdapter if spec.use_dora else LoraAdapter

    def make(target: TargetWeight, weight: Tensor) -> Adapter:
        return kind(spec, weight, ranks[target.name])

    attach_all(root, targets, make, spec.lora_bias)
