"""A linear map with a frozen weight and low-rank changes to it, without the cost of either.

    y = x (W + sum_i E_i B_i A_i)^T + b

with E_i the placement of part i in the rows of a fused weight. For more rows of x than the rank it
is cheaper to change the weight than the output: the forward is one matrix product as in the frozen
layer, and the backward never forms the gradient of W (out, in), only those of A and B, through the
rank. x is kept once for all parts, the changed weight not at all.

N rows of x, r rank.
"""

from itertools import accumulate, pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

Rows = tuple[int, int]


def joined(rows: tuple[Rows, ...], factors: tuple[Tensor, ...], like: Tensor) -> list[Tensor]:
    """All parts as one pair: A (R, in) of all ranks below each other, B (out, R) with B_i in its
    rows and columns. One wide product is faster than a skinny one per part."""
    downs, ups = factors[::2], factors[1::2]
    if len(rows) == 1 and rows[0] == (0, like.shape[0]):
        return [downs[0].to(like.dtype), ups[0].to(like.dtype)]
    up = like.new_zeros(like.shape[0], sum(u.shape[1] for u in ups))
    for (start, end), columns, part in zip(rows, spans(ups), ups, strict=True):
        up[start:end, columns] = part.to(like.dtype)
    return [torch.cat(downs).to(like.dtype), up]


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
    def forward(ctx, x, weight, bias, rows, *factors):  # noqa: ANN001, ANN205
        ctx.rows, ctx.has_bias = rows, bias is not None
        ctx.save_for_backward(x, weight, *factors)
        down, up = joined(rows, factors, weight)
        changed = torch.addmm(weight, up, down).to(x.dtype)
        return F.linear(x, changed, None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx, g):  # noqa: ANN001, ANN205
        x, weight, *factors = ctx.saved_tensors
        down, up = joined(ctx.rows, tuple(factors), weight)
        flat = g.flatten(0, -2)  # (N, out)
        gx = None
        if ctx.needs_input_grad[0]:
            gx = (flat @ torch.addmm(weight, up, down).to(g.dtype)).view(x.shape)
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
    rows: tuple[Rows, ...],
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
