"""Attention of a chunk of instances: what `attention_pool` computes, in both directions.

R rows of a chunk, M instances of all bags, D width, H hidden, A attention, K branches.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from glovita_lib.random_masks import Keep

BLANK = 1e-6  # length of a prepared instance below which it stays zero


class Weights(NamedTuple):
    """The tensors that learn, in the order in which autograd sees them."""

    gamma: Tensor | None  # (D,) scale of the LayerNorm; None leaves the preparation out
    beta: Tensor | None  # (D,)
    project: Tensor  # (H, D) W1
    project_bias: Tensor  # (H,)
    gate: Tensor  # (2A, H) V above U; (A, H) V alone without a gate
    gate_bias: Tensor  # (2A,) or (A,)
    score: Tensor  # (K, A) w
    score_bias: Tensor  # (K,)


@dataclass(frozen=True)
class Plan:
    """What a pass does besides its tensors."""

    gated: bool
    unit_length: bool  # whether prepared instances get length 1
    eps: float  # of the LayerNorm
    keep_hidden: Keep | None  # dropout mask m over H columns
    keep_gate: Keep | None  # dropout mask m' over A columns
    kept: Tensor | None  # (M, K) bool: instances whose weight attention dropout leaves


class Prepared(NamedTuple):
    """A chunk after the preparation."""

    rows: Tensor  # (R, D) y, what the projection sees
    scaled: Tensor | None  # (R, D) r n
    length: Tensor | None  # (R, 1) r = 1 / |u|, or ones
    deviation: Tensor | None  # (R, 1) 1 / std


def tanh_(x: Tensor) -> Tensor:
    """tanh in place.

    On a CPU as 2 sigmoid(2x) - 1, three to five times faster and exact to 1e-7; half precision
    keeps its own tanh, which is relatively exact near 0.
    """
    if x.device.type == "cpu" and x.dtype == torch.float32:
        return x.mul_(2).sigmoid_().mul_(2).sub_(1)
    return x.tanh_()


class Pass:
    """Forward computations of chunks, the same for both directions."""

    def __init__(self, features: Tensor, weights: Weights, plan: Plan, dtype: torch.dtype) -> None:
        self.features, self.plan, self.dtype = features, plan, dtype
        self.weights = Weights(*(w if w is None else w.detach().to(dtype) for w in weights))
        self.attention = weights.score.shape[1]

    def prepare(self, rows: slice | Tensor) -> Prepared:
        """Rows of the features, normalised where asked for."""
        x = self.features[rows]
        gamma, beta = self.weights.gamma, self.weights.beta
        if gamma is None:
            return Prepared(x.to(self.dtype), None, None, None)
        wide = x.to(torch.promote_types(self.dtype, torch.float32))
        n, _, deviation = torch.native_layer_norm(wide, wide.shape[-1:], None, None, self.plan.eps)
        u = torch.addcmul(beta.to(n.dtype), n, gamma.to(n.dtype))
        if not self.plan.unit_length:
            return Prepared(u.to(self.dtype), n, torch.ones_like(deviation), deviation)
        norm = torch.linalg.vector_norm(u, dim=1, keepdim=True)
        length = torch.where(norm > BLANK, 1 / norm, 0.0)
        return Prepared(u.mul_(length).to(self.dtype), n.mul_(length), length, deviation)

    def hidden(self, y: Tensor, rows: slice | Tensor, out: Tensor | None = None) -> Tensor:
        """h (R, H) of prepared rows y (R, D)."""
        w = self.weights
        h = torch.addmm(w.project_bias, y, w.project.T, out=out).relu_()
        return drop_(h, self.plan.keep_hidden, rows)

    def gates(self, h: Tensor) -> tuple[Tensor, Tensor | None]:
        """tanh(V h + bv) (R, A) and sigmoid(U h + bu) (R, A)."""
        both = torch.addmm(self.weights.gate_bias, h, self.weights.gate.T)
        if not self.plan.gated:
            return tanh_(both), None
        return tanh_(both[:, : self.attention]), both[:, self.attention :].sigmoid_()

    def scores(self, h: Tensor, rows: slice) -> Tensor:
        """a (R, K)."""
        t, s = self.gates(h)
        product = drop_(t if s is None else t * s, self.plan.keep_gate, rows)
        return torch.addmm(self.weights.score_bias, product, self.weights.score.T)


def drop_(x: Tensor, keep: Keep | None, rows: slice | Tensor) -> Tensor:
    """Multiply by a dropout mask in place."""
    if keep is None:
        return x
    if isinstance(rows, slice):
        rows = torch.arange(rows.start, rows.stop, device=x.device)
    return x.mul_(keep.rows(rows))
