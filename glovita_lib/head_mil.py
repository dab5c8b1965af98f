"""Multiple-instance heads besides CLAM: attention pooling, two streams, mean, max and TransMIL.

B bags, M instances of all bags, D width, K classes or targets.
"""

import math
from functools import reduce
from operator import add
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glovita_lib.attention_pool import AttentionPool
from glovita_lib.bags import (
    Bags,
    as_bags,
    segment_max,
    segment_order,
    segment_pool,
    segment_softmax,
)
from glovita_lib.heads import build_head
from glovita_lib.network import eager
from glovita_lib.spec_model import (
    AbmilHead,
    DsmilHead,
    MaxMilHead,
    MeanMilHead,
    TemporalTransformerHead,
    TransmilHead,
)

NORM_EPS = 1e-6  # as CLAM's default


class Abmil(nn.Module):
    """logits = W sum_i alpha_i h_i + b, with the (gated) attention of Ilse, Tomczak, Welling, ICML
    2018; see `attention_pool`."""

    consumes = "features"
    mixed_before = "classifier"

    def __init__(self, spec: AbmilHead, *, width: int, outputs: int) -> None:
        super().__init__()
        self.pool = AttentionPool(
            width,
            hidden=spec.hidden,
            attention=spec.attention,
            branches=1,
            gated=spec.gate,
            dropout=spec.dropout,
            norm_eps=NORM_EPS if spec.feature_prep else None,
            unit_length=False,
            attn_drop=0.0,
        )
        self.classifier = nn.Linear(spec.hidden, outputs)

    def forward(self, inputs: Any, targets: Tensor | None = None) -> dict[str, Any]:
        """What `as_bags` takes -> "logits" (B, K), "scores" (M, 1) before the softmax, "aux" {}.

        Targets are given to every head on instances; this one has no auxiliary loss for them.
        """
        scores, pooled, _ = self.pool(as_bags(inputs))
        return {"logits": self.classifier(pooled.squeeze(1)), "scores": scores, "aux": {}}

    def attention(self, inputs: Any) -> tuple[Tensor, Tensor]:
        """Attention of each instance, before and after the softmax over its bag: 2 x (M, 1)."""
        bags = as_bags(inputs)
        scores, _, _ = self.pool(bags)
        return scores, segment_softmax(scores, bags)


class Dsmil(nn.Module):
    """Two streams (Li, Li, Eliceiri, "Dual-stream multiple instance learning network for whole
    slide image classification with self-supervised contrastive learning", CVPR 2021).

    With the instances x_i of a bag and m_k = argmax_i c_ik:

    - instance stream c_i = W_0 x_i + b_0, of the bag: c_{m_k, k}
    - attention stream q_i = tanh(W_2 relu(W_1 x_i + b_1) + b_2),
      alpha_ik = softmax_i(q_i . q_{m_k} / sqrt(Q)), z_k = sum_i alpha_ik dropout(x_i), and of
      the bag W (z_1, ..., z_K) + b
    - loss: half of each stream's; prediction: the mean of both, or the attention stream
    """

    consumes = "features"

    def __init__(self, spec: DsmilHead, *, width: int, outputs: int) -> None:
        super().__init__()
        self.average = spec.average
        self.instance = nn.Linear(width, outputs)
        size = spec.attention
        self.query = nn.Sequential(
            nn.Linear(width, size), nn.ReLU(), nn.Linear(size, size), nn.Tanh()
        )
        self.drop = nn.Dropout(spec.dropout)
        self.classifier = nn.Linear(outputs * width, outputs)

    def forward(self, inputs: Any, targets: Tensor | None = None) -> dict[str, Any]:
        """What `as_bags` takes -> "logits" (B, K), "fitted", "scores" (M, K) before the softmax,
        "aux" {}."""
        bags = as_bags(inputs)
        x = bags.features.to(self.instance.weight.dtype)  # (M, D)
        best, scores = self.streams(bags, x)
        with torch.autocast(x.device.type, enabled=False):
            pooled = segment_pool(segment_softmax(scores, bags), self.drop(x), bags)  # (B, K, D)
            attended = self.classifier(pooled.flatten(1))
        logits = (best + attended) / 2 if self.average else attended
        fitted = [(0.5, attended), (0.5, best)]
        return {"logits": logits, "fitted": fitted, "scores": scores, "aux": {}}

    def streams(self, bags: Bags, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of the highest-scoring instances (B, K), raw attention (M, K)."""
        c, q = self.instance(x), self.query(x).to(x.dtype)  # (M, K), (M, Q)
        first = torch.tensor(bags.bounds[:-1]).to(x.device, non_blocking=True)
        best = segment_order(c.detach(), bags)[first]  # (B, K) rows
        pairs = zip(bags.split(q), q[best], strict=True)  # (n, Q) and (K, Q) of each bag
        with torch.autocast(x.device.type, enabled=False):
            scores = torch.cat([own @ critical.T for own, critical in pairs])
        return c.gather(0, best).to(x.dtype), scores / q.shape[1] ** 0.5

    def attention(self, inputs: Any) -> tuple[Tensor, Tensor]:
        """Attention of each instance, before and after the softmax over its bag: 2 x (M, K)."""
        bags = as_bags(inputs)
        _, scores = self.streams(bags, bags.features.to(self.instance.weight.dtype))
        return scores, segment_softmax(scores, bags)


class PooledMil(nn.Module):
    """logits = W dropout(v) + b, v the mean or the largest value per feature over a bag."""

    consumes = "features"
    mixed_before = "linear"

    def __init__(self, width: int, outputs: int, *, pool: str, dropout: float) -> None:
        super().__init__()
        self.pool = pool
        self.drop = nn.Dropout(dropout)
        self.linear = nn.Linear(width, outputs)

    def forward(self, inputs: Any, targets: Tensor | None = None) -> Tensor:
        """What `as_bags` takes -> logits (B, K).

        Targets are given to every head on instances; this one has no auxiliary loss for them.
        """
        bags = as_bags(inputs)
        pooled = mean_of_bags(bags) if self.pool == "mean" else segment_max(bags.features, bags)
        return self.linear(self.drop(pooled.to(self.linear.weight.dtype)))  # (B, K)


def mean_of_bags(bags: Bags) -> Tensor:
    """Mean over the instances of each bag, (B, D), at least float32."""
    features = bags.features
    dtype = torch.promote_types(features.dtype, torch.float32)
    if bags.whole.long:
        return torch.stack([bag.mean(0, dtype=dtype) for bag in bags.split(features)])
    shares = (1 / bags.ptr.diff().to(dtype))[bags.index]  # (M,)
    return segment_pool(shares[:, None], features.to(dtype), bags).squeeze(1)


@build_head.register
def _(spec: AbmilHead, *, width: int, outputs: int) -> nn.Module:
    return Abmil(spec, width=width, outputs=outputs)


@build_head.register
def _(spec: DsmilHead, *, width: int, outputs: int) -> nn.Module:
    return Dsmil(spec, width=width, outputs=outputs)


@build_head.register
def _(spec: MeanMilHead, *, width: int, outputs: int) -> nn.Module:
    return PooledMil(width, outputs, pool="mean", dropout=spec.dropout)


@build_head.register
def _(spec: MaxMilHead, *, width: int, outputs: int) -> nn.Module:
    return PooledMil(width, outputs, pool="max", dropout=spec.dropout)


# ---------------------------------------------------------------------------------- TransMIL
#
# A transformer over the instances of a bag, with Nystrom attention.
#
# Shao, Bian, Chen, Wang, Zhang, Ji, Zhang, "TransMIL: Transformer based correlated multiple
# instance learning for whole slide image classification", NeurIPS 2021. Instances h_i = relu(W x_i
# + b) are laid out row by row in the smallest square that holds them, the first ones again where it
# is not full, behind a class token; then attention, convolutions over the square, attention, and a
# linear layer on the class token.
#
# Attention is that of Xiong et al., "Nystromformer", AAAI 2021. With landmarks q', k', means of L /
# P neighbouring queries and keys, and S(a, b) = softmax(a b^T / sqrt(E)):
#
#     S(q, k) v  ~  S(q, k') (S(q', k')^+ (S(q', k) v))
#
# Taken from the right, no matrix is larger than (P, L), and both outer products are those of
# scaled_dot_product_attention, which does not keep it.
#
# M instances of all bags, N of a bag, L tokens of a bag, D width, H hidden, A heads, E = H / A,
# P landmarks, K classes or targets.

LOCAL = 33  # neighbours that the convolution beside the attention sees
ITERATIONS = 6  # of the pseudo-inverse
SIDES = (7, 5, 3)  # of the convolutions over the square
LEAST = 1e-12  # weight of an instance that gets none


class Nystrom(nn.Module):
    """x + dropout(W_o (attention of LayerNorm(x) + its convolved values) + b_o)."""

    def __init__(self, hidden: int, *, heads: int, landmarks: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.landmarks = heads, landmarks
        self.norm = nn.LayerNorm(hidden)
        self.qkv = nn.Linear(hidden, 3 * hidden, bias=False)
        self.local = nn.Conv2d(
            heads, heads, (LOCAL, 1), padding=(LOCAL // 2, 0), groups=heads, bias=False
        )
        self.out = nn.Linear(hidden, hidden)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (L, H) -> (L, H)."""
        q, k, v = self.split(x)
        near, far, inverse = self.landmarks_of(q, k)
        summed = F.scaled_dot_product_attention(near, k, v)  # (A, P, E)
        with torch.autocast(x.device.type, enabled=False):
            summed = (inverse @ summed.to(inverse.dtype)).to(v.dtype)
        mixed = F.scaled_dot_product_attention(q, far, summed)  # (A, L', E)
        mixed = (mixed + self.local(v[None])[0]).transpose(0, 1).flatten(1)  # (L', H)
        return x + self.drop(self.out(mixed[-len(x) :]))

    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values, each (A, L', E): zeros stand before the tokens, until their
        number is a multiple of that of the landmarks."""
        x = F.pad(self.norm(x), (0, 0, -len(x) % self.landmarks, 0))
        return self.qkv(x).unflatten(1, (3, self.heads, -1)).permute(1, 2, 0, 3).unbind()

    def landmarks_of(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q' (A, P, E), k' (A, P, E) and S(q', k')^+ (A, P, P), at least float32."""
        near = q.unflatten(1, (self.landmarks, -1)).mean(2)  # (A, P, E)
        far = k.unflatten(1, (self.landmarks, -1)).mean(2)
        with torch.autocast(q.device.type, enabled=False):
            return near, far, pseudo_inverse(similarity(near, far))

    def weights_of_first(self, x: Tensor) -> Tensor:
        """Attention (L,) of the first token to all of them, mean over the heads; as it approximates
        a softmax it sums to about 1, and some may be negative."""
        q, k, _ = self.split(x)
        near, far, inverse = self.landmarks_of(q, k)
        with torch.autocast(x.device.type, enabled=False):
            first = similarity(q[:, [-len(x)]], far) @ inverse  # (A, 1, P)
            return (first @ similarity(near, k)).mean(0)[0, -len(x) :]


def similarity(a: Tensor, b: Tensor) -> Tensor:
    """softmax(a b^T / sqrt(E)) over the rows of b, at least float32: (A, P, E), (A, Q, E) ->
    (A, P, Q)."""
    wide = torch.promote_types(a.dtype, torch.float32)
    return (a.to(wide) @ b.to(wide).mT * a.shape[-1] ** -0.5).softmax(-1)


def pseudo_inverse(matrices: Tensor) -> Tensor:
    """Moore-Penrose inverses (A, P, P) by the iteration of Razavi et al., 2014, begun as in the
    published code: transposed, over the largest sums of rows and columns of all heads."""
    z = matrices.mT / (matrices.abs().sum(-1).max() * matrices.abs().sum(-2).max())
    eye = torch.eye(matrices.shape[-1], dtype=matrices.dtype, device=matrices.device)
    for _ in range(ITERATIONS):
        product = matrices @ z
        z = 0.25 * z @ (13 * eye - product @ (15 * eye - product @ (7 * eye - product)))
    return z


class Square(nn.Module):
    """x plus its convolutions over 7x7, 5x5 and 3x3 neighbours, a channel at a time: one
    convolution, by the sum of the kernels."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(
            nn.Conv2d(hidden, hidden, side, padding=side // 2, groups=hidden) for side in SIDES
        )

    def forward(self, x: Tensor) -> Tensor:
        """A class token and a square of instances (1 + side^2, H) -> (1 + side^2, H)."""
        side = math.isqrt(len(x) - 1)
        square = x[1:].T.unflatten(1, (side, side))[None]  # (1, H, side, side)
        kernels = (c.get_parameter("weight") for c in self.convolutions)
        padded = (F.pad(k, [(SIDES[0] - k.shape[-1]) // 2] * 4) for k in kernels)
        kernel = reduce(add, padded)  # (H, 1, 7, 7)
        bias = reduce(add, (c.get_parameter("bias") for c in self.convolutions))
        mixed = F.conv2d(square, kernel, bias, padding=SIDES[0] // 2, groups=x.shape[1])
        return torch.cat([x[:1], x[1:] + mixed[0].flatten(1).T])


class Transmil(nn.Module):
    """logits = W LayerNorm(class token) + b behind attention, convolutions and attention."""

    consumes = "features"
    mixed_before = "classifier"

    def __init__(self, spec: TransmilHead, *, width: int, outputs: int) -> None:
        super().__init__()
        hidden, options = spec.hidden, {"heads": spec.heads, "landmarks": spec.landmarks}
        self.project = nn.Linear(width, hidden)
        self.token = nn.Parameter(torch.randn(hidden))
        self.first = Nystrom(hidden, **options, dropout=spec.dropout)
        self.square = Square(hidden)
        self.second = Nystrom(hidden, **options, dropout=spec.dropout)
        self.norm = nn.LayerNorm(hidden)
        self.classifier = nn.Linear(hidden, outputs)

    def forward(self, inputs: Any, targets: Tensor | None = None) -> Tensor:
        """What `as_bags` takes -> logits (B, K).

        Targets are given to every head on instances; this one has no auxiliary loss for them.
        """
        tokens = [self.second(x)[0] for x in self.tokens(as_bags(inputs))]  # (H,) of each bag
        return self.classifier(self.norm(torch.stack(tokens)))

    @eager
    def tokens(self, bags: Bags) -> list[Tensor]:
        """Tokens (1 + side^2, H) of each bag before the second attention. One bag at a time: their
        squares and landmarks differ in size, and padding would change them."""
        h = self.project(bags.features.to(self.project.weight.dtype)).relu()  # (M, H)
        return [self.square(self.first(self.laid_out(own))) for own in bags.split(h)]

    def laid_out(self, h: Tensor) -> Tensor:
        """The class token and the instances (N, H) as a square: (1 + side^2, H)."""
        side = math.isqrt(len(h) - 1) + 1
        return torch.cat([self.token.to(h.dtype)[None], h, h[: side**2 - len(h)]])

    def attention(self, inputs: Any) -> tuple[Tensor, Tensor]:
        """Attention of the class token to each instance in the second layer, logarithm and share in
        its bag: 2 x (M, 1). An instance that fills the square too has the sum of both."""
        bags = as_bags(inputs)
        logarithms, shares = [], []
        for x, count in zip(self.tokens(bags), bags.lengths.tolist(), strict=True):
            weights = self.second.weights_of_first(x)[1:]  # (side^2,)
            own = weights[:count].clone()  # (N,)
            own[: len(weights) - count] += weights[count:]
            own = own.clamp(min=LEAST)
            logarithms.append(own.log())
            shares.append(own / own.sum())
        return torch.cat(logarithms)[:, None], torch.cat(shares)[:, None]


@build_head.register
def _(spec: TransmilHead, *, width: int, outputs: int) -> nn.Module:
    return Transmil(spec, width=width, outputs=outputs)


# -------------------------------------------------------------------- temporal transformer
#
# Instances in their order, frames of a clip or slices of a volume:
#
#     h_i = W (x_i, |x_{i+1} - x_i|, ..., |x_{i+r} - x_i|) + b + p_i
#
# with the sines and cosines p_i of the place i (Vaswani et al., "Attention is all you need",
# NeurIPS 2017), behind a class token; blocks with the norm before attention and MLP; a linear layer
# on the class token. Behind the last instance of a bag stands that one again.
#
# B bags, M instances of all bags, N of the longest, D width, H hidden, A heads, E = H / A.

LONGEST = 10_000.0  # the slowest sine takes 2 pi times as many instances to come round


class TemporalBlock(nn.Module):
    """x + dropout(attention(LayerNorm(x))), then x + dropout(MLP(LayerNorm(x)))."""

    def __init__(self, spec: TemporalTransformerHead) -> None:
        super().__init__()
        hidden, inner = spec.hidden, round(spec.hidden * spec.mlp_ratio)
        self.num_heads = spec.heads
        self.norm1, self.norm2 = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.qkv, self.proj = nn.Linear(hidden, 3 * hidden), nn.Linear(hidden, hidden)
        self.fc1, self.fc2 = nn.Linear(hidden, inner), nn.Linear(inner, hidden)
        self.drop = nn.Dropout(spec.dropout)

    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values, each (B, A, L, E), of tokens (B, L, H)."""
        return (
            self.qkv(self.norm1(x))
            .unflatten(2, (3, self.num_heads, -1))
            .permute(2, 0, 3, 1, 4)
            .unbind()
        )

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Tokens (B, L, H), of which those of the mask (B, L) count -> the same."""
        q, k, v = self.split(x)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None])
        x = x + self.drop(self.proj(y.transpose(1, 2).flatten(2)))
        return x + self.drop(self.fc2(F.gelu(self.fc1(self.norm2(x)))))

    def scores_of_first(self, x: Tensor) -> Tensor:
        """Attention of the first token to all of them before the softmax, (B, A, L)."""
        q, k, _ = self.split(x)
        return (q[:, :, :1] @ k.mT)[:, :, 0] * q.shape[-1] ** -0.5


class TemporalTransformer(nn.Module):
    """logits = W LayerNorm(class token) + b behind the blocks."""

    mixed_before = "classifier"

    consumes = "features"

    def __init__(self, spec: TemporalTransformerHead, *, width: int, outputs: int) -> None:
        super().__init__()
        self.reach, hidden = spec.differences, spec.hidden
        self.prepare = nn.LayerNorm(width) if spec.feature_prep else nn.Identity()
        self.project = nn.Linear((self.reach + 1) * width, hidden)
        self.token = nn.Parameter(torch.zeros(hidden))
        self.blocks = nn.ModuleList(TemporalBlock(spec) for _ in range(spec.depth))
        self.norm = nn.LayerNorm(hidden)
        self.classifier = nn.Linear(hidden, outputs)
        nn.init.normal_(self.token, std=0.02)

    def forward(self, inputs: Any, targets: Tensor | None = None) -> Tensor:
        """What `as_bags` takes -> logits (B, K).

        Targets are given to every head on instances; this one has no auxiliary loss for them.
        """
        x, mask = self.tokens(as_bags(inputs))
        for block in self.blocks:
            x = block(x, mask)
        return self.classifier(self.norm(x[:, 0]))

    def tokens(self, bags: Bags) -> tuple[Tensor, Tensor]:
        """Tokens (B, 1 + N, H) before the first block, the class token first, and which are real
        (B, 1 + N)."""
        x = self.prepare(bags.features.to(self.project.weight.dtype))  # (M, D)
        changes = [(x[rows] - x).abs() for rows in self.behind(bags)]
        h = self.project(torch.cat([x, *changes], 1))  # (M, H)
        h = h + sines(bags.longest, h.shape[1]).to(h)[bags.position]
        padded, first = bags.pad(h, 0.0), self.token.to(h.dtype).expand(len(bags), 1, -1)
        return torch.cat([first, padded], 1), F.pad(bags.mask, (1, 0), value=True)

    def behind(self, bags: Bags) -> list[Tensor]:
        """Rows (M,) of the first, the second ... instance behind each one, in its bag."""
        last = bags.ptr[bags.index + 1] - 1  # (M,)
        rows = torch.arange(len(last), device=last.device)
        return [torch.minimum(rows + step, last) for step in range(1, self.reach + 1)]

    def attention(self, inputs: Any) -> tuple[Tensor, Tensor]:
        """Attention of the class token to each instance in the last block, mean over the heads,
        logarithm and share in its bag: 2 x (M, 1)."""
        bags = as_bags(inputs)
        x, mask = self.tokens(bags)
        for block in self.blocks[:-1]:
            x = block(x, mask)
        scores = self.blocks[-1].scores_of_first(x)  # type: ignore[operator]  # a TemporalBlock
        scores = scores.float().masked_fill(~mask[:, None], -torch.inf)
        shares = scores.softmax(2).mean(1)[:, 1:]  # (B, N)
        own = shares[bags.mask].clamp(min=LEAST)[:, None]  # (M, 1)
        raw = own.log()
        return raw, segment_softmax(raw, bags)


def sines(count: int, width: int) -> Tensor:
    """Sines and cosines (count, width) of places at frequencies from 1 to 1 / LONGEST."""
    exponents = torch.arange(width // 2) / (width // 2)
    angles = torch.arange(count)[:, None] * LONGEST**-exponents
    return torch.cat([angles.sin(), angles.cos()], 1)


@build_head.register
def _(spec: TemporalTransformerHead, *, width: int, outputs: int) -> nn.Module:
    return TemporalTransformer(spec, width=width, outputs=outputs)
