"""Attention pooling of bags: dropout masks, one chunk of instances, all chunks, the module."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from glovita_lib.bags import Bags, Span
from glovita_lib.network import eager

# ----------------------------------------------------------------------------- dropout masks
#
# Dropout masks that any row can ask for again: counter-based bits instead of stored masks.
#
# Bits of word w of row i are SplitMix64's output function of seed + (i * words + w) [1], the same
# on every device. A mask costs an eighth to a fortieth of `bernoulli_`, which draws serially on a
# CPU.
#
# [1] Steele, Lea, Flood: Fast splittable pseudorandom number generators. OOPSLA 2014.
#
# R rows, C columns.

GOLDEN, MIX1, MIX2 = -7046029254386353131, -4658895280553007687, -7723592293110705685
LANES = ((torch.uint8, 8), (torch.int16, 16), (torch.int32, 32))  # widths of a random number


def random_words(counters: Tensor) -> Tensor:
    """SplitMix64 of int64 counters, in place: 64 random bits each."""
    z = counters.mul_(GOLDEN)
    shifted = torch.empty_like(z)
    for shift, factor in ((30, MIX1), (27, MIX2), (31, 1)):
        torch.bitwise_right_shift(z, shift, out=shifted)
        z ^= shifted.bitwise_and_((1 << (64 - shift)) - 1)  # a logical shift of signed numbers
        z *= factor
    return z


@dataclass(frozen=True, slots=True)
class Keep:
    """Which entries of an (M, C) matrix survive dropout: each with probability `keep`.

    Exact where keep is a multiple of 1/256 or 1/65536, else within 2^-33.
    """

    keep: float
    columns: int
    seed: int

    @classmethod
    def draw(cls, keep: float, columns: int) -> "Keep":
        """A mask whose seed comes from torch's CPU generator."""
        return cls(keep, columns, int(torch.randint(2**62, ())))

    def rows(self, rows: Tensor) -> Tensor:
        """Mask of rows (R,) int64: (R, C) of an integer type, 1 or 0, on their device.

        Integers, because multiplying by them is four times faster on a CPU than by booleans.
        """
        dtype, bits = next((d, b) for d, b in LANES if b == 32 or (self.keep * 2**b).is_integer())
        words = -(-self.columns * bits // 64)
        counters = torch.arange(words, device=rows.device) + (rows * words + self.seed)[:, None]
        lanes = random_words(counters).view(dtype)[:, : self.columns]
        threshold = round(self.keep * 2**bits)
        if dtype != torch.uint8:  # signed numbers start at -2^(bits - 1)
            threshold -= 2 ** (bits - 1)
        return lanes.lt_(threshold)


# --------------------------------------------------------------------------------- one chunk
#
# Attention of a chunk of instances: what `attention_pool` computes, in both directions.
#
# R rows of a chunk, M instances of all bags, D width, H hidden, A attention, K branches.

BLANK = 1e-6  # length of a prepared instance below which it stays zero


class Norm(NamedTuple):
    """Scale and shift of the LayerNorm."""

    gamma: Tensor  # (D,)
    beta: Tensor  # (D,)


class Weights(NamedTuple):
    """The tensors that learn."""

    norm: Norm | None  # None leaves the preparation out
    project: Tensor  # (H, D) W1
    project_bias: Tensor  # (H,)
    gate: Tensor  # (2A, H) V above U; (A, H) V alone without a gate
    gate_bias: Tensor  # (2A,) or (A,)
    score: Tensor  # (K, A) w
    score_bias: Tensor  # (K,)

    def flat(self) -> list[Tensor]:
        """In the order in which autograd sees them."""
        return [*(self.norm or ()), *self[1:]]

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> "Weights":
        """Of tensors in that order."""
        norm = Norm(*tensors[:-6]) if len(tensors) > 6 else None
        return cls(norm, *tensors[-6:])


@dataclass(frozen=True)
class PassOptions:
    """What a pass does besides its tensors."""

    gated: bool
    unit_length: bool  # whether prepared instances get length 1
    eps: float  # of the LayerNorm
    keep_hidden: Keep | None  # dropout mask m over H columns
    keep_gate: Keep | None  # dropout mask m' over A columns
    kept: Tensor | None  # (M, K) bool: instances whose weight attention dropout leaves


class Normed(NamedTuple):
    """What the preparation of a chunk has done."""

    scaled: Tensor  # (R, D) r n
    length: Tensor  # (R, 1) r = 1 / |u|, or ones
    deviation: Tensor  # (R, 1) 1 / std


class Prepared(NamedTuple):
    """A chunk after the preparation."""

    rows: Tensor  # (R, D) y, what the projection sees
    normed: Normed | None


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

    def __init__(
        self, features: Tensor, weights: Weights, plan: PassOptions, dtype: torch.dtype
    ) -> None:
        self.features, self.plan, self.dtype = features, plan, dtype
        self.weights = Weights.of([w.detach().to(dtype) for w in weights.flat()])
        self.attention = weights.score.shape[1]

    def prepare(self, rows: slice | Tensor) -> Prepared:
        """Rows of the features, normalised where asked for."""
        x = self.features[rows]
        norm = self.weights.norm
        if norm is None:
            return Prepared(x.to(self.dtype), None)
        wide = x.to(torch.promote_types(self.dtype, torch.float32))
        n, _, deviation = torch.native_layer_norm(wide, wide.shape[-1:], None, None, self.plan.eps)
        u = torch.addcmul(norm.beta.to(n.dtype), n, norm.gamma.to(n.dtype))
        if not self.plan.unit_length:
            return Prepared(u.to(self.dtype), Normed(n, torch.ones_like(deviation), deviation))
        long = torch.linalg.vector_norm(u, dim=1, keepdim=True)
        length = torch.where(long > BLANK, 1 / long, 0.0)
        return Prepared(u.mul_(length).to(self.dtype), Normed(n.mul_(length), length, deviation))

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


# -------------------------------------------------------------------------------- all chunks
#
# Attention pooling of bags in one differentiable step that holds a few chunks of rows in memory.
#
# With instances x_i of a bag, LayerNorm n_i = (x_i - mean) / std, and the weights below:
#
#     u_i = gamma * n_i + beta,  y_i = u_i / |u_i|               (preparation, both optional)
#     h_i = m_i * relu(W1 y_i + b1)                              (m: dropout mask)
#     a_ik = w_k . (m'_i * tanh(V h_i + bv) * sigmoid(U h_i + bu)) + b_k
#     alpha_ik = exp(a_ik) / sum_j exp(a_jk),  z_k = sum_i alpha_ik h_i
#
# Gated attention is that of Ilse, Tomczak, Welling, "Attention-based deep multiple instance
# learning", ICML 2018; the sums over i run in chunks with a running maximum as in Milakov,
# Gimelshein, "Online normalizer calculation for softmax", 2018. The backward pass computes
# activations again, chunk by chunk (checkpointing; Chen et al. 2016), except as many h_i as the
# largest bag alone would keep under plain autograd. Scales 1 / (1 - p) of dropout are in W1 and w:
# relu is homogeneous, and a mask on tanh times a mask on sigmoid is one mask.
#
# B bags, M instances of all bags, R rows of a chunk, D width, H hidden, A attention, K branches.

CHUNK_ROWS = {"cpu": 2048, "cuda": 32768}  # a CPU chunk's activations fit its caches


def chunks(bags: Bags) -> Iterator[tuple[slice, Span]]:
    """Ranges of rows that are computed at once."""
    total = bags.bounds[-1]
    step = CHUNK_ROWS.get(bags.features.device.type, CHUNK_ROWS["cuda"])
    for start in range(0, total, step):
        stop = min(start + step, total)
        yield slice(start, stop), bags.span(start, stop)


def stash_rows(bags: Bags, weights: Weights, plan: PassOptions) -> int:
    """Rows whose h is kept for the backward pass: as much memory as plain autograd needs for the
    activations of the largest bag."""
    hidden, attention = weights.project.shape[0], weights.score.shape[1]
    activations = hidden + attention * (3 if plan.gated else 1)
    if plan.keep_hidden is not None:  # their outputs, and masks of a byte
        activations += hidden * 5 // 4
    if plan.keep_gate is not None:
        activations += attention * (2 if plan.gated else 1) * 5 // 4
    return min(bags.longest * activations // hidden, bags.bounds[-1])


class _AttentionPool(torch.autograd.Function):
    """(features, weights) -> scores a (M, K) and pooled z (B, K, H)."""

    @staticmethod
    def forward(
        ctx: Any,
        bags: Bags,
        plan: PassOptions,
        dtype: torch.dtype,
        features: Tensor,
        *tensors: Tensor,
    ) -> tuple[Tensor, Tensor]:
        weights = Weights.of(tensors)
        branches, hidden = weights.score.shape[0], weights.project.shape[0]
        work = Pass(features, weights, plan, dtype)
        wide = torch.promote_types(dtype, torch.float32)
        new = features.new_empty
        scores = new((bags.bounds[-1], branches), dtype=wide)
        state = RunningSums(len(bags), branches, hidden, scores)
        kept = stash_rows(bags, weights, plan) if any(ctx.needs_input_grad) else 0
        stash = new((kept, hidden), dtype=dtype)
        for rows, span in chunks(bags):
            out = stash[rows] if rows.stop <= kept else None
            h = work.hidden(work.prepare(rows).rows, rows, out)
            scores[rows] = work.scores(h, rows)
            weight = None if plan.kept is None else plan.kept[rows]
            state.add(span, scores[rows], weight, h)
        if plan.kept is not None:
            state.add_top(bags, work, plan.kept)
        pooled = state.pooled / state.total[..., None]
        ctx.bags, ctx.plan, ctx.dtype = bags, plan, dtype
        sums = state.largest, state.total
        ctx.save_for_backward(features, scores, pooled, *sums, stash, *tensors)
        return scores, pooled

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_scores: Tensor, d_pooled: Tensor) -> tuple[Tensor | None, ...]:
        features, scores, pooled, largest, total, stash, *tensors = ctx.saved_tensors
        bags, plan = ctx.bags, ctx.plan
        work = Pass(features, Weights.of(tensors), plan, ctx.dtype)
        grads = Gradients(work, features if ctx.needs_input_grad[3] else None)
        # As it enters the products: what rounding does to it must cancel between each h_j . dz_k
        # and their mean, of which the gradients of the attention are small differences.
        d_pooled = d_pooled.to(ctx.dtype).to(pooled.dtype)
        offsets = (d_pooled * pooled).sum(2)  # (B, K) sum_j alpha_jk (h_j . dz_k)
        attended = attended_rows(scores, largest, plan, bags)
        for rows, span in chunks(bags):
            prepared = work.prepare(rows)
            known = rows.stop <= len(stash)
            h = stash[rows] if known else work.hidden(prepared.rows, rows)
            alpha = (scores[rows] - largest[span.bags][span.index]).exp_()  # (R, K)
            alpha /= total[span.bags][span.index]
            if attended is not None:
                alpha *= attended[rows]
            d_z = d_pooled[span.bags]  # (P, K, H)
            d_alpha = span.dots(h, d_z.to(h.dtype))  # (R, K)
            d_a = alpha * (d_alpha - offsets[span.bags][span.index]) + d_scores[rows]
            grads.add(rows, span, prepared, h, d_a.to(h.dtype), alpha.to(h.dtype), d_z.to(h.dtype))
        wanted = zip(grads.flat(), tensors, ctx.needs_input_grad[4:], strict=True)
        of_weights = [grad.to(t.dtype) if needed else None for grad, t, needed in wanted]
        return (None, None, None, grads.features, *of_weights)


class RunningSums:
    """Softmax-weighted sums whose maximum rises as chunks arrive."""

    def __init__(self, bags: int, branches: int, hidden: int, like: Tensor) -> None:
        self.largest = like.new_full((bags, branches), -torch.inf)
        self.total = like.new_zeros((bags, branches))
        self.pooled = like.new_zeros((bags, branches, hidden))
        self.scores = like  # (M, K)

    def add(self, span: Span, scores: Tensor, kept: Tensor | None, h: Tensor) -> None:
        """Rows of a chunk: scores (R, K), kept (R, K) bool, h (R, H)."""
        before = self.largest[span.bags]  # (P, K) of the P bags in this chunk
        now = torch.maximum(before, span.max(scores))
        shrink = (before - now).exp()  # earlier chunks knew a lower maximum
        weights = (scores - now[span.index]).exp_()  # (R, K), at most 1
        if kept is not None:
            weights *= kept
        self.largest[span.bags] = now
        self.total[span.bags] = self.total[span.bags] * shrink + span.sum(weights)
        sums = span.pool(weights, h.to(weights.dtype))  # float16 would overflow in long bags
        self.pooled[span.bags] = self.pooled[span.bags] * shrink[..., None] + sums

    def add_top(self, bags: Bags, work: Pass, kept: Tensor) -> None:
        """The top instance of each bag where attention dropout took it: its weight is exp(0); kept
        (M, K) bool."""
        top = top_rows(self.scores, self.largest, bags)  # (B, K)
        gone = ~kept.gather(0, top)
        rows = top.flatten()
        h = work.hidden(work.prepare(rows).rows, rows).view(*top.shape, -1)
        self.total += gone
        self.pooled += gone[..., None] * h


def top_rows(scores: Tensor, largest: Tensor, bags: Bags) -> Tensor:
    """First row that attains the maximum of its bag: (B, K) int64."""
    rows = torch.arange(len(scores), device=scores.device)[:, None].expand_as(scores)
    rows = rows.masked_fill(scores < largest[bags.index], len(scores))
    index = bags.index[:, None].expand_as(rows)
    return torch.full_like(largest, len(scores), dtype=torch.int64).scatter_reduce(
        0, index, rows, "amin"
    )


def attended_rows(scores: Tensor, largest: Tensor, plan: PassOptions, bags: Bags) -> Tensor | None:
    """(M, K) bool: what attention dropout leaves, with the top instance of each bag; None: all."""
    if plan.kept is None:
        return None
    return plan.kept.scatter(0, top_rows(scores, largest, bags), True)


class Gradients:
    """Sums of gradients over chunks."""

    def __init__(self, work: Pass, features: Tensor | None) -> None:
        self.work = work
        wide = torch.promote_types(work.dtype, torch.float32)
        self.sums = Weights.of([torch.zeros_like(w, dtype=wide) for w in work.weights.flat()])
        self.features = None if features is None else torch.empty_like(features)
        # of the preparation
        width = self.sums.project[0]
        self.lengths = torch.zeros_like(self.sums.project_bias)  # (H,) e = sum_i r_i dpre_i
        self.squares = torch.zeros_like(width)  # (D,) sum_i d_i (r_i n_i)^2
        self.crossed = torch.zeros_like(width)  # (D,) sum_i d_i r_i (r_i n_i)
        self.norms = torch.zeros_like(width[:1])  # (1,) sum_i d_i r_i^2

    def add(
        self,
        rows: slice,
        span: Span,
        prepared: Prepared,
        h: Tensor,
        d_a: Tensor,
        alpha: Tensor,
        d_z: Tensor,
    ) -> None:
        """A chunk: h (R, H), d_a (R, K), alpha (R, K), d_z (P, K, H)."""
        d_gates = self._scores(rows, h, d_a)  # (R, 2A)
        d_h = d_gates @ self.work.weights.gate  # (R, H)
        span.spread_(d_h, alpha, d_z)
        # h is 0 where relu or the dropout mask made it so
        d_pre = torch.ops.aten.threshold_backward(d_h, h, 0)
        self.sums.project_bias.add_(d_pre.sum(0))
        if prepared.normed is None:
            accumulate_(self.sums.project, d_pre, prepared.rows)
        else:
            self._preparation(prepared.normed, d_pre, h)
        if self.features is not None:
            self.features[rows] = self._rows(prepared, d_pre)

    def _scores(self, rows: slice, h: Tensor, d_a: Tensor) -> Tensor:
        """Gradient of V h + bv and U h + bu, (R, 2A) or (R, A)."""
        work = self.work
        t, s = work.gates(h)
        keep = work.plan.keep_gate
        product = drop_(t * s if s is not None else t.clone(), keep, rows)  # (R, A)
        accumulate_(self.sums.score, d_a, product)
        self.sums.score_bias.add_(d_a.sum(0))
        d_product = drop_(d_a @ work.weights.score, keep, rows)  # (R, A)
        backward = torch.ops.aten
        if s is None:
            d_gates = backward.tanh_backward(d_product, t)
        else:
            d_gates = torch.cat(
                (
                    backward.tanh_backward(d_product * s, t),
                    backward.sigmoid_backward(d_product * t, s),
                ),
                dim=1,
            )
        accumulate_(self.sums.gate, d_gates, h)
        self.sums.gate_bias.add_(d_gates.sum(0))
        return d_gates

    def _preparation(self, normed: Normed, d_pre: Tensor, h: Tensor) -> None:
        """Sums from which `flat` makes the gradients of W1, gamma and beta, without a second
        product of the size of the projection."""
        scaled, length, _ = normed
        accumulate_(self.sums.project, d_pre, scaled.to(d_pre.dtype))
        self.lengths.add_((d_pre * length).sum(0))
        if not self.work.plan.unit_length:
            return
        # y . dy = sum_h dpre_h (W1 y)_h, and W1 y + b1 = h wherever dpre is not 0
        along = (d_pre * (h - self.work.weights.project_bias)).sum(1).to(scaled.dtype)  # (R,) d_i
        self.squares.add_(along @ (scaled * scaled))
        along = along * length[:, 0]
        self.crossed.add_(along @ scaled)
        self.norms.add_(along @ length)

    def _rows(self, prepared: Prepared, d_pre: Tensor) -> Tensor:
        """Gradient of the instances, (R, D)."""
        d_y = d_pre @ self.work.weights.project  # (R, D)
        norm, normed = self.work.weights.norm, prepared.normed
        if norm is None or normed is None:
            return d_y
        if self.work.plan.unit_length:
            y = prepared.rows
            d_y = normed.length * (d_y - y * (y * d_y).sum(1, keepdim=True))
        # scaled = r n; blank instances have n = 0 and gradient 0
        n = normed.scaled / normed.length.clamp(min=torch.finfo(normed.length.dtype).tiny)
        d_n = d_y * norm.gamma
        centred = d_n - d_n.mean(1, keepdim=True) - n * (d_n * n).mean(1, keepdim=True)
        return normed.deviation * centred

    def flat(self) -> list[Tensor]:
        """Gradients in the order of the weights."""
        norm = self.work.weights.norm
        if norm is None:
            return self.sums.flat()
        # G = sum_i dpre_i (r_i n_i)^T; y = r (gamma n + beta), along: see _preparation
        (gamma, beta), project, product = norm, self.work.weights.project, self.sums.project
        of_gamma = (product * project).sum(0) - gamma * self.squares - beta * self.crossed
        of_beta = self.lengths.to(project.dtype) @ project
        of_beta = of_beta - gamma * self.crossed - beta * self.norms
        of_project = product * gamma + self.lengths[:, None] * beta
        return self.sums._replace(norm=Norm(of_gamma, of_beta), project=of_project).flat()


def accumulate_(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left^T right: (H, D), (R, H), (R, D)."""
    if total.dtype == left.dtype:
        total.addmm_(left.T, right)
    else:
        total.add_(left.T @ right)


def compute_dtype(bags: Bags, weight: Tensor) -> torch.dtype:
    """Type of the matrix products: autocast's where it is on, else the wider of the two."""
    device = bags.features.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return torch.promote_types(bags.features.dtype, weight.dtype)


@eager
def attention_pool(bags: Bags, weights: Weights, plan: PassOptions) -> tuple[Tensor, Tensor]:
    """Attention scores a (M, K), before the softmax and before attention dropout, and pooled
    vectors z (B, K, H), both at least float32, differentiable once."""
    dtype = compute_dtype(bags, weights.project)
    with torch.autocast(bags.features.device.type, enabled=False):
        return _AttentionPool.apply(bags, plan, dtype, bags.features, *weights.flat())


@eager
def hidden_rows(bags: Bags, rows: Tensor, weights: Weights, plan: PassOptions) -> Tensor:
    """h (S, H) of chosen rows (S,), with gradients, under the same dropout masks.

    For the few instances that an auxiliary loss looks at; the pool gives none of its h away.
    """
    dtype = compute_dtype(bags, weights.project)
    with torch.autocast(bags.features.device.type, enabled=False):
        y = bags.features[rows]
        if weights.norm is not None:
            gamma, beta = weights.norm
            y = y.to(torch.promote_types(dtype, torch.float32))
            y = torch.nn.functional.layer_norm(
                y, y.shape[-1:], gamma.to(y.dtype), beta.to(y.dtype), plan.eps
            )
            if plan.unit_length:
                norm = torch.linalg.vector_norm(y.detach(), dim=1, keepdim=True)
                y = torch.where(norm > BLANK, torch.nn.functional.normalize(y), 0.0)
        h = torch.nn.functional.linear(
            y.to(dtype), weights.project.to(dtype), weights.project_bias.to(dtype)
        ).relu()
        keep = plan.keep_hidden
        return h if keep is None else h * keep.rows(rows)


# -------------------------------------------------------------------------------- the module


class AttentionPool(nn.Module):
    """Projection and attention of instances, with the pooling of `attention_pool`."""

    def __init__(
        self,
        width: int,
        *,
        hidden: int,
        attention: int,
        branches: int,
        gated: bool,
        dropout: float,
        norm_eps: float | None,
        unit_length: bool,
        attn_drop: float,
    ) -> None:
        super().__init__()
        self.norm = None if norm_eps is None else nn.LayerNorm(width, eps=norm_eps)
        self.project = nn.Linear(width, hidden)
        self.attention = nn.Linear(hidden, attention * (2 if gated else 1))  # tanh, then sigmoid
        self.score = nn.Linear(attention, branches)
        self.gated, self.unit_length = gated, unit_length
        self.dropout, self.attn_drop = dropout, attn_drop

    def weights(self) -> Weights:
        """The tensors as the pooling takes them, with the scales of dropout in them."""
        stay = 1 - self.dropout if self.training else 1.0
        gate_stay = stay**2 if self.gated else stay
        norm, project, score = self.norm, self.project, self.score
        return Weights(
            norm=None if norm is None else Norm(norm.weight, norm.bias),
            project=project.weight if stay == 1 else project.weight / stay,
            project_bias=project.bias if stay == 1 else project.bias / stay,
            gate=self.attention.weight,
            gate_bias=self.attention.bias,
            score=score.weight if stay == 1 else score.weight / gate_stay,
            score_bias=score.bias,
        )

    def plan(self, bags: Bags) -> PassOptions:
        """Random choices of one pass, from torch's generators."""
        stay = 1 - self.dropout if self.training else 1.0
        keep_hidden = keep_gate = kept = None
        if stay < 1:
            keep_hidden = Keep.draw(stay, self.project.out_features)
            keep_gate = Keep.draw(stay**2 if self.gated else stay, self.score.in_features)
        if self.training and self.attn_drop:
            shape = (len(bags.features), self.score.out_features)
            kept = torch.rand(shape, device=bags.features.device) >= self.attn_drop
        eps = 0.0 if self.norm is None else self.norm.eps
        return PassOptions(self.gated, self.unit_length, eps, keep_hidden, keep_gate, kept)

    def forward(self, bags: Bags) -> tuple[Tensor, Tensor, "Instances"]:
        """Scores (M, K), bag vectors (B, K, H), and access to single hidden instances."""
        weights, plan = self.weights(), self.plan(bags)
        scores, pooled = attention_pool(bags, weights, plan)
        return scores, pooled, Instances(bags, weights, plan)


class Instances:
    """Hidden features of chosen instances of one pass, under its dropout masks."""

    def __init__(self, bags: Bags, weights: Weights, plan: PassOptions) -> None:
        self.bags, self.weights, self.plan = bags, weights, plan

    def __call__(self, rows: Tensor) -> Tensor:
        """rows (...) int64 -> h (..., H), at least float32, with gradients."""
        h = hidden_rows(self.bags, rows.flatten(), self.weights, self.plan)
        return h.to(torch.promote_types(h.dtype, torch.float32)).view(*rows.shape, h.shape[1])
