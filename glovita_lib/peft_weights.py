"""PEFT methods that merge into the weights, other than low-rank ones."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from glovita_lib.errors import UserError
from glovita_lib.network import RowRange, encoder_of, is_norm
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
    every,
    freeze,
    is_adapted,
    members_of,
    resolve_targets,
    train_biases,
)
from glovita_lib.spec_peft import (
    Bitfit,
    Boft,
    DiffFit,
    FourierFt,
    Gps,
    Ia3,
    LnTuning,
    Loha,
    Lokr,
    Oft,
    Ssf,
)

# ----------------------------------------------------------------------------- LoHa and LoKr
#
# Changes that are products of small matrices: Hadamard (LoHa) and Kronecker (LoKr).
#
# A convolution's weight is read as the matrix (out, in * kernel).


class Product(Adapter):
    """W + s M with a matrix M made of small ones."""

    scale: float
    rank_dropout: float

    def product(self) -> Tensor:
        """M (out, in * kernel)."""
        raise NotImplementedError

    def merged_weight(self, weight: Tensor) -> Tensor:
        """W + s M; in training some rows of M are dropped, the others grow so that the mean
        stays."""
        change = self.product() * self.scale  # (out, in * kernel)
        if self.training and self.rank_dropout > 0:
            change = change * F.dropout(change.new_ones(len(change), 1), self.rank_dropout)
        return weight + change.view(weight.shape)


class LohaAdapter(Product):
    """(B1 A1) * (B2 A2), elementwise; starts at A2 = 0."""

    def __init__(self, spec: Loha, weight: Tensor, rank: int) -> None:
        super().__init__()
        out, width = weight.flatten(1).shape
        self.scale, self.rank_dropout = spec.alpha / rank, spec.rank_dropout
        self.B1, self.B2 = (nn.Parameter(torch.empty(out, rank)) for _ in range(2))
        self.A1, self.A2 = (nn.Parameter(torch.zeros(rank, width)) for _ in range(2))
        for started in (self.B1, self.A1, self.B2):
            nn.init.kaiming_uniform_(started, a=math.sqrt(5))

    def product(self) -> Tensor:
        """(B1 A1) * (B2 A2)."""
        return (self.B1 @ self.A1) * (self.B2 @ self.A2)


class LokrAdapter(Product):
    """kron(W1, W2) with W2 = B A where that is smaller; starts at W1 = 0."""

    def __init__(self, spec: Lokr, weight: Tensor, rank: int) -> None:
        super().__init__()
        out, inside = weight.shape[:2]
        kernel = weight[0, 0].numel()
        self.scale, self.rank_dropout = spec.alpha / rank, spec.rank_dropout
        (rows1, rows2), (columns1, columns2) = (
            factor_pair(size, spec.decompose_factor) for size in (out, inside)
        )
        self.W1 = nn.Parameter(torch.zeros(rows1, columns1))
        self.full = rank >= max(rows2, columns2) / 2
        if self.full:
            self.W2 = nn.Parameter(torch.empty(rows2, columns2 * kernel))
            nn.init.kaiming_uniform_(self.W2, a=math.sqrt(5))
            return
        self.B = nn.Parameter(torch.empty(rows2, rank))
        self.A = nn.Parameter(torch.empty(rank, columns2 * kernel))
        for started in (self.B, self.A):
            nn.init.kaiming_uniform_(started, a=math.sqrt(5))

    def product(self) -> Tensor:
        """kron(W1, W2): the kernel is the fastest index of both, so one product serves all."""
        return torch.kron(self.W1, self.W2 if self.full else self.B @ self.A)


def factor_pair(size: int, largest: int) -> tuple[int, int]:
    """Two factors of a size, the first at most the second and at most `largest` (-1: no limit)."""
    bound = math.isqrt(size) if largest < 1 else min(largest, math.isqrt(size))
    first = max(f for f in range(1, bound + 1) if size % f == 0)
    return first, size // first


@apply_peft.register
def apply_product(spec: Loha | Lokr, model: nn.Module) -> None:
    """Freeze the encoder and put an adapter on every target."""
    root = encoder_of(model)
    targets = resolve_targets(root, spec.targets, allowed=("linear", "conv"))
    ranks = by_pattern(spec.rank_pattern, targets, spec.rank)

    def make(target: TargetWeight, weight: Tensor) -> Adapter:
        rank = ranks[target.name]
        if isinstance(spec, Loha):
            return LohaAdapter(spec, weight, rank)
        return LokrAdapter(spec, weight, rank)

    attach_all(root, targets, make, "none")


# ------------------------------------------------------------------------------ OFT and BOFT
#
# Changes that turn the inputs of a layer by an orthogonal matrix R: OFT and BOFT.
#
# y = x R W^T + b, so the changed weight is W R^T. A convolution's weight is read as the matrix
# (out, in * kernel). r blocks of size n.


def some_identity(rotation: Tensor, share: float, *, training: bool) -> Tensor:
    """In training every block (..., n, n) is the identity with probability `share`."""
    if not training or share == 0:
        return rotation
    kept = torch.rand(rotation.shape[:-2], device=rotation.device) >= share
    eye = torch.eye(rotation.shape[-1], device=rotation.device, dtype=rotation.dtype)
    return torch.where(kept[..., None, None], rotation, eye)


def solved(skew: Tensor) -> Tensor:
    """Cayley transform (I - Q)(I + Q)^-1 of skew-symmetric matrices (..., n, n)."""
    eye = torch.eye(skew.shape[-1], device=skew.device, dtype=skew.dtype).expand_as(skew)
    return torch.linalg.solve(eye + skew, eye - skew, left=False)


def cayley_series(skew: Tensor) -> Tensor:
    """(I + Q)(I - Q)^-1 to the fourth order: I + 2 Q + 2 Q^2 + 2 Q^3 + Q^4."""
    eye = torch.eye(skew.shape[-1], device=skew.device, dtype=skew.dtype)
    square = skew @ skew  # (..., n, n)
    cube = square @ skew
    return eye + 2 * (skew + square + cube) + cube @ skew


class OftAdapter(Adapter):
    """R = blocks of orthogonal matrices of the entries `q` above the diagonal of Q; starts at Q =
    0.

    The peft library's form: the two ways to compute R turn in opposite directions.
    """

    above: Tensor  # (2, n (n - 1) / 2) rows and columns of the entries

    def __init__(self, spec: Oft, width: int) -> None:
        super().__init__()
        self.spec, self.size = spec, width // spec.r
        self.q = nn.Parameter(torch.zeros(spec.r, self.size * (self.size - 1) // 2))
        above = torch.triu_indices(self.size, self.size, 1)
        self.register_buffer("above", above, persistent=False)

    def rotation(self) -> Tensor:
        """R's blocks (r, n, n)."""
        half = self.q.new_zeros(self.spec.r, self.size, self.size)
        blocks = torch.arange(self.spec.r, device=self.q.device)
        half = half.index_put((blocks[:, None], *self.above), self.q)  # (r, n, n)
        skew = half - half.transpose(1, 2)
        blocks = cayley_series(skew) if self.spec.use_cayley_neumann else solved(skew)
        return some_identity(blocks, self.spec.dropout, training=self.training)

    def merged_weight(self, weight: Tensor) -> Tensor:
        """W R^T."""
        pieces = weight.reshape(len(weight), self.spec.r, self.size)  # (out, r, n)
        turned = torch.einsum("orc,rkc->ork", pieces, self.rotation().to(weight.dtype))
        return turned.reshape(weight.shape)

    @classmethod
    def run(cls, x: Tensor, layer: nn.Module, members: Members[Self]) -> Tensor:
        """A whole Linear layer turns its inputs, which spares the gradient of the weight."""
        rows, adapter = members[0]
        if rows is not None or not isinstance(layer, nn.Linear):
            return super().run(x, layer, members)
        blocks = adapter.rotation().to(x.dtype)
        pieces = x.unflatten(-1, (adapter.spec.r, adapter.size))  # (..., r, n)
        turned = torch.einsum("...rk,rkc->...rc", pieces, blocks).flatten(-2)
        return call(layer, turned, base_weight(layer), base_bias(layer))

    @classmethod
    @torch.no_grad()
    def after_step(cls, adapters: Sequence[Self], step: int, total_steps: int) -> None:
        """coft: bring every block's Q back to |Q| <= eps / sqrt(r)."""
        for adapter in adapters:
            if not adapter.spec.coft:
                continue
            bound = adapter.spec.eps / math.sqrt(adapter.spec.r)
            norm = adapter.q.norm(dim=1, keepdim=True) * math.sqrt(2)  # both triangles of Q
            adapter.q.mul_((bound / norm.clamp(min=1e-30)).clamp(max=1.0))


class BoftAdapter(Adapter):
    """R = B_m ... B_1; factor i mixes blocks that lie 2^i apart. Starts at R = I, s = 1. The bias
    is not scaled."""

    orders: Tensor  # (factors, in * kernel)

    def __init__(self, spec: Boft, out: int, width: int) -> None:
        super().__init__()
        self.spec = spec
        blocks = width // spec.block_size
        shape = (spec.n_butterfly, blocks, spec.block_size, spec.block_size)
        self.R = nn.Parameter(torch.zeros(shape))
        self.s = nn.Parameter(torch.ones(out))
        orders = [butterfly_order(width, i, spec.block_size) for i in range(spec.n_butterfly)]
        self.register_buffer("orders", torch.stack(orders), persistent=False)

    def merged_weight(self, weight: Tensor) -> Tensor:
        """s W R^T, one factor after the other; R W^T = B_m (... (B_1 W^T))."""
        skew = (self.R - self.R.transpose(2, 3)) / 2  # (factors, blocks, n, n)
        factors = some_identity(solved(skew), self.spec.dropout, training=self.training)
        turned = weight.flatten(1).t()  # (in * kernel, out)
        for blocks, order in zip(factors.to(weight.dtype).unbind(), self.orders, strict=True):
            # B = P D P^T with P[i, order[i]] = 1: (P^T v)[order] = v, (P u) = u[order]
            mixed = torch.empty_like(turned).index_copy(0, order, turned)
            mixed = blocks @ mixed.unflatten(0, (len(blocks), -1))
            turned = mixed.flatten(0, 1)[order]
        return (self.s[:, None].to(weight.dtype) * turned.t()).reshape(weight.shape)


def butterfly_order(width: int, level: int, block: int) -> Tensor:
    """Order (width,) that brings halves of blocks together which lie 2^level blocks apart: within
    2^level blocks first the even half-blocks, then the odd ones."""
    half = block // 2
    if level == 0:
        return torch.arange(width)
    pieces = torch.arange(width).view(-1, 2**level * 2, half)  # (group, half-block, half)
    return torch.cat([pieces[:, 0::2], pieces[:, 1::2]], dim=1).flatten()


def check_blocks(name: str, width: int, block: int) -> None:
    """Raises UserError where a layer's inputs do not divide into blocks."""
    if width % block:
        near = [n for n in range(1, min(width, 4 * block) + 1) if width % n == 0]
        raise UserError(
            f"peft.r = {block}: {name} reads {width} inputs, not a multiple of it; divisors near"
            f" it: {', '.join(map(str, near[-6:]))}; change it or leave the layer out of"
            " peft.targets"
        )


def check_butterfly(name: str, width: int, spec: Boft) -> None:
    """Raises UserError where a layer's inputs do not divide into the factors' blocks."""
    factors = spec.n_butterfly
    unit = spec.block_size * 2 ** (factors - 1)
    if width % unit == 0:
        return
    sizes = [n for n in range(1, width + 1) if width % (n * 2 ** (factors - 1)) == 0]
    sizes = [n for n in sizes if factors == 1 or n % 2 == 0]
    fewer = [n for n in range(1, factors) if width % (spec.block_size * 2 ** (n - 1)) == 0]
    mend = [f"peft.block_size one of {', '.join(map(str, sizes[-8:]))}"] if sizes else []
    mend += [f"peft.n_butterfly at most {fewer[-1]}"] if fewer else []
    raise UserError(
        f"peft.block_size = {spec.block_size} with peft.n_butterfly = {factors}: {name} reads"
        f" {width} inputs, not a multiple of block_size * 2^(n_butterfly - 1) = {unit}; possible"
        f" there: {' or '.join(mend) or 'no block size with so many factors'}; or leave the layer"
        " out of peft.targets"
    )


@apply_peft.register
def apply_orthogonal(spec: Oft | Boft, model: nn.Module) -> None:
    """Freeze the encoder and put a rotation on every target.

    Raises:
        UserError: blocks that do not divide the input width of a target.
    """
    root = encoder_of(model)
    targets = resolve_targets(root, spec.targets, allowed=("linear", "conv"))

    def make(target: TargetWeight, weight: Tensor) -> Adapter:
        out, width = weight.flatten(1).shape
        if isinstance(spec, Oft):
            check_blocks(target.name, width, spec.r)
            return OftAdapter(spec, width)
        check_butterfly(target.name, width, spec)
        if spec.n_butterfly > 1 and spec.block_size % 2:
            raise UserError(
                f"peft.block_size = {spec.block_size} must be even for peft.n_butterfly ="
                f" {spec.n_butterfly}; use {spec.block_size + 1} or one factor"
            )
        return BoftAdapter(spec, out, width)

    attach_all(root, targets, make, spec.bias)


# --------------------------------------------------------------------------------- FourierFT
#
# FourierFT: a change with few Fourier coefficients (Gao et al., ICML 2024).


class FourierAdapter(Adapter):
    """scaling Re IDFT2(S), S zero but at n random places; a layer with fewer entries has them
    all."""

    places: Tensor  # (n,)

    def __init__(self, spec: FourierFt, weight: Tensor) -> None:
        super().__init__()
        self.scaling = spec.scaling
        entries = weight.numel()
        generator = torch.Generator().manual_seed(spec.random_loc_seed)
        places = torch.randperm(entries, generator=generator)[: spec.n_frequency]
        self.register_buffer("places", places)
        self.spectrum = nn.Parameter(torch.zeros(len(places)))

    def merged_weight(self, weight: Tensor) -> Tensor:
        """W plus the inverse transform, which is computed in float32."""
        dense = torch.zeros(weight.numel(), device=weight.device)
        dense = dense.index_put((self.places,), self.spectrum.float())  # S, (out * in * kernel,)
        change = torch.fft.ifft2(dense.view(len(weight), -1)).real * self.scaling
        return weight + change.view(weight.shape).to(weight.dtype)


@apply_peft.register
def apply_fourierft(spec: FourierFt, model: nn.Module) -> None:
    """Freeze the encoder and put a spectrum on every target."""
    root = encoder_of(model)
    targets = resolve_targets(root, spec.targets, allowed=("linear", "conv"))

    def make(target: TargetWeight, weight: Tensor) -> Adapter:
        return FourierAdapter(spec, weight)

    attach_all(root, targets, make, "none")


# ---------------------------------------------------------------------- (IA)^3, SSF, DiffFit
#
# Learned factors and shifts of channels: (IA)^3, SSF and DiffFit.


class OutputScale(Adapter):
    """y * gamma + beta behind the layer's bias; beta only where there is a bias to take it up."""

    def __init__(self, channels: int, *, shifts: bool) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels))
        self.beta = nn.Parameter(torch.zeros(channels)) if shifts else None

    def merged_weight(self, weight: Tensor) -> Tensor:
        """Rows times gamma."""
        return weight * self.gamma.view(-1, *[1] * (weight.ndim - 1))

    def merged_bias(self, weight: Tensor, bias: Tensor) -> Tensor:
        """gamma b + beta."""
        bias = bias * self.gamma
        return bias if self.beta is None else bias + self.beta

    @classmethod
    def run(cls, x: Tensor, layer: nn.Module, members: Members[Self]) -> Tensor:
        """The frozen layer, then the factors: no gradient of the weight is formed."""
        y = call(layer, x, base_weight(layer), base_bias(layer))  # (..., out) or (B, out, ...)
        gamma = spread_members(layer, members, "gamma", 1.0).to(y.dtype)
        trailing = (1,) * (base_weight(layer).ndim - 2) if isinstance(layer, _ConvNd) else ()
        gamma = gamma.view(-1, *trailing)  # (out, 1, ...)
        if members[0][1].beta is None:
            return y * gamma
        beta = spread_members(layer, members, "beta", 0.0).to(y.dtype)
        return torch.addcmul(beta.view(-1, *trailing), y, gamma)


def spread_members(
    layer: nn.Module, members: Members[OutputScale], name: str, rest: float
) -> Tensor:
    """A vector of all members over the layer's outputs, `rest` where no member is."""
    pieces: list[Tensor] = []
    end = 0
    weight = base_weight(layer)
    for rows, adapter in members:
        if rows is None:
            return getattr(adapter, name)
        pieces += [weight.new_full((rows[0] - end,), rest), getattr(adapter, name)]
        end = rows[1]
    return torch.cat([*pieces, weight.new_full((weight.shape[0] - end,), rest)])


class InputScale(Adapter):
    """W (x * l), for a Linear layer or a convolution of one group."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.l = nn.Parameter(torch.ones(channels))

    def merged_weight(self, weight: Tensor) -> Tensor:
        """Columns times l."""
        return weight * self.l.view(-1, *[1] * (weight.ndim - 2))

    @classmethod
    def run(cls, x: Tensor, layer: nn.Module, members: Members[Self]) -> Tensor:
        """The factors, then the frozen layer."""
        factor = members[0][1].l.to(x.dtype)
        factor = factor.view(-1, *[1] * (base_weight(layer).ndim - 2))  # (in, 1, ...)
        return call(layer, x * factor, base_weight(layer), base_bias(layer))


@apply_peft.register
def apply_ia3(spec: Ia3, model: nn.Module) -> None:
    """Freeze the encoder; factors on the outputs of the targets, on the inputs of fc2."""
    root = encoder_of(model)
    targets = resolve_targets(
        root, spec.targets, allowed=("linear", "conv"), unset=("k", "v", "fc2")
    )

    def make(target: TargetWeight, weight: Tensor) -> Adapter:
        if target.role == "fc2":
            return InputScale(weight.shape[1])
        return OutputScale(len(weight), shifts=False)

    attach_all(root, targets, make, "none")


@apply_peft.register
def apply_ssf(spec: Ssf | DiffFit, model: nn.Module) -> None:
    """Freeze the encoder; factors (and shifts for SSF) behind all its layers, with norms; all
    biases for DiffFit."""
    root = encoder_of(model)
    shifting = isinstance(spec, Ssf)

    def make(target: TargetWeight, weight: Tensor) -> Adapter:
        shifts = shifting and base_bias(target.layer.module) is not None
        return OutputScale(len(weight), shifts=shifts)

    targets = every(root, ("linear", "conv", "norm"))
    attach_all(root, targets, make, "none" if shifting else "all")


# ------------------------------------------------------------------ BitFit, norm tuning, GPS
#
# Methods that train a part of the parameters that are there: BitFit, norm tuning and GPS.


@apply_peft.register
def apply_bitfit(spec: Bitfit, model: nn.Module) -> None:
    """Freeze the encoder but its biases.

    Raises:
        UserError: an encoder without biases.
    """
    root = encoder_of(model)
    train_biases(root, "all", freeze(root))
    if not any(p.requires_grad for p in root.parameters()):
        raise UserError(
            'peft.method = "bitfit": this encoder has no bias; use another method, as "lora"'
        )


@apply_peft.register
def apply_ln_tuning(spec: LnTuning, model: nn.Module) -> None:
    """Freeze the encoder but the scales and shifts of its norm layers.

    Raises:
        UserError: an encoder without such layers.
    """
    root = encoder_of(model)
    free = {id(p) for p in freeze(root)}
    norms = [m for m in root.modules() if is_norm(m)]
    if not norms:
        raise UserError(
            'peft.method = "ln_tuning": this encoder has no norm layer with scales; use another'
            " method"
        )
    for norm in norms:
        for parameter in norm.parameters(recurse=False):
            parameter.requires_grad_(id(parameter) in free)


class SelectedEntries(Adapter):
    """k entries of every row of a weight train, as a matrix of their own: whatever an optimizer
    does to parameters (decay, momentum), the others are none and stay as they are.

    Until `calibrate` has chosen them they are the first of each row.
    """

    places: Tensor  # (out, k) columns of the entries

    def __init__(self, weight: Tensor, per_row: int) -> None:
        super().__init__()
        flat = weight.flatten(1)
        per_row = min(per_row, flat.shape[1])
        places = torch.arange(per_row, device=flat.device).expand(len(flat), per_row)
        self.register_buffer("places", places.contiguous())
        self.values = nn.Parameter(flat[:, :per_row].clone())

    def merged_weight(self, weight: Tensor) -> Tensor:
        """W with the trained entries in their places."""
        flat = weight.flatten(1).scatter(1, self.places, self.values.to(weight.dtype))
        return flat.view(weight.shape)

    @classmethod
    def calibrate(
        cls,
        model: nn.Module,
        batches: Iterable[Any],
        loss: Callable[[Any], Tensor],
        mean: Callable[[Tensor], Tensor],
    ) -> None:
        """Choose the entries that train by the gradient of the summed loss of the batches."""
        adapted = [
            (layer, rows, adapter)
            for layer in model.modules()
            if is_adapted(layer)
            for rows, adapter in members_of(layer)
            if isinstance(adapter, cls)
        ]
        sums = {layer: torch.zeros_like(base_weight(layer)) for layer, _, _ in adapted}
        with trained([base_weight(layer) for layer in sums]):
            for batch in batches:
                add_gradients(loss(batch), adapted, sums)
        for layer in sums:
            sums[layer] = mean(sums[layer])
        for layer, rows, adapter in adapted:
            adapter.choose(base_weight(layer, rows), part_of(sums[layer], rows))

    @torch.no_grad()
    def choose(self, weight: Tensor, gradient: Tensor) -> None:
        """Take the entries with the largest |gradient| of every row; gradient as the weight."""
        per_row = self.places.shape[1]
        self.places.copy_(gradient.flatten(1).abs().topk(per_row, dim=1).indices)
        self.values.copy_(weight.flatten(1).gather(1, self.places))


@apply_peft.register
def apply_gps(spec: Gps, model: nn.Module) -> None:
    """Freeze the encoder; entries of every row and the biases of the targets train.

    The entries are chosen by `SelectedEntries.calibrate`.
    """
    root = encoder_of(model)
    kinds = ("linear", "conv")
    if spec.targets is None:
        targets = every(root, kinds)
    else:
        targets = resolve_targets(root, spec.targets, allowed=kinds)

    def make(target: TargetWeight, weight: Tensor) -> Adapter:
        return SelectedEntries(weight, spec.gps_topk_per_row)

    attach_all(root, targets, make, "adapted")


def add_gradients(
    loss: Tensor,
    adapted: Sequence[tuple[nn.Module, RowRange | None, SelectedEntries]],
    sums: dict[nn.Module, Tensor],
) -> None:
    """Add the gradients of whole weights to `sums`, by layer."""
    weights = [base_weight(layer) for layer in sums]
    entries = [adapter.values for _, _, adapter in adapted]
    found = torch.autograd.grad(loss, [*weights, *entries], allow_unused=True)
    for total, dense in zip(sums.values(), found, strict=False):
        if dense is not None:
            total += dense
    # the entries that train now have their gradient apart
    for (layer, rows, adapter), own in zip(adapted, found[len(weights) :], strict=True):
        if own is not None:
            total = part_of(sums[layer], rows).flatten(1)  # a view
            total.scatter_add_(1, adapter.places, own.to(total))


def part_of(tensor: Tensor, rows: RowRange | None) -> Tensor:
    """Rows of a tensor, or all of it."""
    return tensor if rows is None else tensor[rows[0] : rows[1]]


@contextmanager
def trained(weights: list[Tensor]) -> Iterator[None]:
    """The frozen weights take part in autograd for a while."""
    try:
        for weight in weights:
            weight.requires_grad_(True)
        yield
    finally:
        for weight in weights:
            weight.requires_grad_(False)
