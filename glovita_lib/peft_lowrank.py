"""Low-rank methods beside LoRA: AdaLoRA, VeRA, FacT, RepAdapter."""

import math
from collections.abc import Sequence
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from glovita_lib.errors import UserError
from glovita_lib.network import encoder_of
from glovita_lib.peft_base import (
    Adapter,
    Members,
    Shared,
    TargetWeight,
    apply_peft,
    attach_all,
    base_bias,
    base_weight,
    call,
    resolve_targets,
)
from glovita_lib.peft_lora import LowRank
from glovita_lib.spec_peft import Adalora, Fact, RepAdapter, Vera

# ----------------------------------------------------------------------------------- AdaLoRA
#
# AdaLoRA: low-rank changes whose ranks are given to the layers that need them (Zhang et al., ICLR
# 2023).
#
# W + s P diag(e) Q. The importance of entry w is I = |w dL/dw|; over the steps t
#     S_t = beta1 S_(t-1) + (1 - beta1) I_t,   U_t = beta2 U_(t-1) + (1 - beta2) |I_t - S_t|
# and a triplet (column of P, e, row of Q) scores S U of e plus the means of S U over its two
# vectors. Of all triplets of the model the best b(t) stay, the others get e = 0; b falls with the
# third power from the first to the last budget.

TRAINED = ("P", "e", "Q")


class AdaloraAdapter(LowRank):
    """s P diag(e) Q with s = alpha / init_rank; starts at e = 0."""

    transient = tuple(f"{kind}_{name}" for kind in ("S", "U") for name in TRAINED)
    kept: Tensor  # (r,) bool

    def __init__(self, spec: Adalora, weight: Tensor) -> None:
        super().__init__()
        out, width = weight.flatten(1).shape
        rank = spec.init_rank
        self.spec, self.dropout = spec, spec.dropout
        self.scale = spec.alpha / (math.sqrt(rank) if spec.use_rslora else rank)
        self.P = nn.Parameter(torch.empty(out, rank).normal_(std=0.02))
        self.e = nn.Parameter(torch.zeros(rank))
        self.Q = nn.Parameter(torch.empty(rank, width).normal_(std=0.02))
        self.register_buffer("kept", torch.ones(rank, dtype=torch.bool))
        for name in TRAINED:
            value = getattr(self, name).detach()
            self.register_buffer(f"S_{name}", torch.zeros_like(value))
            self.register_buffer(f"U_{name}", torch.zeros_like(value))

    def factors(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """diag(e) Q and s P.

        In evaluation without the triplets that were given up: e is 0 there, but for averaged
        weights, whose e remembers former steps. In training they keep a gradient to come back by.
        """
        e = self.e if self.training else self.e * self.kept
        return e[:, None] * self.Q, self.P * self.scale  # (r, in), (out, r)

    @torch.no_grad()
    def observe(self) -> None:
        """Take this step's gradients into the importance."""
        for name in TRAINED:
            parameter = getattr(self, name)
            if parameter.grad is None:
                continue
            seen = (parameter * parameter.grad).abs()  # I, of the parameter's shape
            mean, spread = getattr(self, f"S_{name}"), getattr(self, f"U_{name}")
            mean.lerp_(seen, 1 - self.spec.beta1)
            spread.lerp_((seen - mean).abs(), 1 - self.spec.beta2)

    def scores(self) -> Tensor:
        """Importance of every triplet (r,)."""
        entry = {name: getattr(self, f"S_{name}") * getattr(self, f"U_{name}") for name in TRAINED}
        return entry["e"] + entry["P"].mean(0) + entry["Q"].mean(1)  # (r,)

    @torch.no_grad()
    def keep(self, kept: Tensor) -> None:
        """Leave these triplets (r,), set the others to zero."""
        self.kept.copy_(kept)
        self.e.masked_fill_(~kept, 0.0)

    @classmethod
    def after_step(cls, adapters: Sequence[Self], step: int, total_steps: int) -> None:
        """Follow the gradients and, when it is time, give the budget anew; in the last part of the
        training the ranks stay as they are."""
        spec = adapters[0].spec
        final = total_steps - round(spec.tfinal * total_steps)
        if step > final:
            for adapter in adapters:
                adapter.keep(adapter.kept)
            return
        for adapter in adapters:
            adapter.observe()
        start = round(spec.tinit * total_steps)
        if step > start and (step % spec.deltaT == 0 or step == final):
            allocate(adapters, budget(spec, len(adapters), step, start, final))

    @classmethod
    def auxiliary_losses(cls, adapters: Sequence[Self]) -> dict[str, Tensor]:
        """orth_reg times the mean of |P'P - I| and |QQ' - I| (Frobenius) over all matrices."""
        weight = adapters[0].spec.orth_reg
        if weight == 0:
            return {}
        norms = [distance(m) for a in adapters for m in (a.P.t() @ a.P, a.Q @ a.Q.t())]  # (r, r)
        return {"orthogonality": weight * torch.stack(norms).mean()}


def distance(gram: Tensor) -> Tensor:
    """Frobenius distance of a matrix from the identity."""
    return (gram - torch.eye(len(gram), device=gram.device, dtype=gram.dtype)).norm()


def budget(spec: Adalora, layers: int, step: int, start: int, final: int) -> int:
    """Triplets of the whole model after a step: b_T + (b_0 - b_T) (1 - (t - t_i) / (t_f -
    t_i))^3."""
    first, last = spec.init_rank * layers, min(spec.rank, spec.init_rank) * layers
    left = 1 - min(1.0, (step - start) / max(1, final - start))
    return int(last + (first - last) * left**3)


def allocate(adapters: Sequence[AdaloraAdapter], triplets: int) -> None:
    """Keep the best triplets of all layers together."""
    scores = torch.cat([a.scores() for a in adapters])  # (layers * init_rank,)
    kept = torch.zeros_like(scores, dtype=torch.bool)
    kept[scores.topk(triplets).indices] = True
    for adapter, mine in zip(adapters, kept.split([len(a.e) for a in adapters]), strict=True):
        adapter.keep(mine)


@apply_peft.register
def apply_adalora(spec: Adalora, model: nn.Module) -> None:
    """Freeze the encoder and put an AdaLoRA adapter on every target."""
    root = encoder_of(model)
    targets = resolve_targets(root, spec.targets, allowed=("linear", "conv"))

    def make(target: TargetWeight, weight: Tensor) -> Adapter:
        return AdaloraAdapter(spec, weight)

    attach_all(root, targets, make, spec.lora_bias)


# ----------------------------------------------------------------------------- VeRA and FacT
#
# Low-rank changes whose matrices all layers share: VeRA and FacT.
#
# The shared tensors are a child of the encoder, so that they are stored once.


class Projections(Shared):
    """Random A (r, widest input) and B (widest output, r), of which a layer takes the first columns
    or rows."""

    A: Tensor
    B: Tensor

    def __init__(self, spec: Vera, out: int, width: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(spec.projection_prng_key)
        for name, shape in (("A", (spec.rank, width)), ("B", (out, spec.rank))):
            tensor = nn.init.kaiming_uniform_(torch.empty(shape), generator=generator)
            self.register_buffer(name, tensor)


class VeraAdapter(LowRank):
    """diag(b) B diag(d) A; starts at b = 0."""

    def __init__(self, spec: Vera, weight: Tensor, shared: Projections) -> None:
        super().__init__()
        self.dropout = spec.dropout
        self.d = nn.Parameter(torch.full((spec.rank,), spec.d_initial))
        self.b = nn.Parameter(torch.zeros(len(weight)))
        self.shared = (shared,)  # in a tuple: it is the encoder's child, not this one's

    def factors(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """diag(d) A and diag(b) B, cut to the layer's size."""
        (shared,) = self.shared
        down, up = shared.A[:, : weight[0].numel()], shared.B[: len(weight)]  # (r, in), (out, r)
        return self.d[:, None] * down, self.b[:, None] * up


@apply_peft.register
def apply_vera(spec: Vera, model: nn.Module) -> None:
    """Freeze the encoder, add the shared projections and a pair of vectors to every target."""
    root = encoder_of(model)
    targets = resolve_targets(root, spec.targets, allowed=("linear", "conv"))
    shapes = [base_weight(t.layer.module, t.rows).flatten(1).shape for t in targets]
    shared = Projections(spec, max(s[0] for s in shapes), max(s[1] for s in shapes))
    shared.to(base_weight(targets[0].layer.module).device)

    def make(target: TargetWeight, weight: Tensor) -> Adapter:
        return VeraAdapter(spec, weight, shared)

    attach_all(root, targets, make, "none")
    root.shared = shared


class FactTensors(Shared):
    """U (D, r), V (D, r) per width D of layers; for the Tucker form also the core C (r, r, r)."""

    def __init__(self, spec: Fact, widths: set[int]) -> None:
        super().__init__()
        for width in sorted(widths):
            u = nn.init.kaiming_uniform_(torch.empty(width, spec.r), a=5**0.5)
            self.register_parameter(f"U_{width}", nn.Parameter(u))
            self.register_parameter(f"V_{width}", nn.Parameter(torch.zeros(width, spec.r)))
        if spec.decomposition == "tk":
            self.C = nn.Parameter(torch.empty(spec.r, spec.r, spec.r))
            nn.init.xavier_uniform_(self.C)


class FactAdapter(LowRank):
    """s U Sigma V' for every slice (D, D) of the weight, cut to its size; starts at V = 0.

    A weight (b D, a D) has b a slices with a Sigma (r, r) each; one of a and b is 1, since D is the
    smaller side.
    """

    def __init__(self, spec: Fact, weight: Tensor, shared: FactTensors) -> None:
        super().__init__()
        self.dropout, self.scale, self.shared = spec.dropout, spec.scale, (shared,)
        self.width = min(weight.shape)
        slices = -(-max(weight.shape) // self.width)  # rounded up
        shape = (slices, spec.r, spec.r) if spec.decomposition == "tt" else (slices, spec.r)
        self.sigma = nn.Parameter(nn.init.xavier_uniform_(torch.empty(shape)))

    def cores(self) -> Tensor:
        """Sigma of every slice (slices, r, r): output side, input side."""
        if self.sigma.ndim == 3:
            return self.sigma
        return torch.einsum("sk,ijk->sij", self.sigma, self.shared[0].C)  # (slices, r, r)

    def factors(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """A (r, in) and B (out, r)."""
        out, inside = weight.shape
        u = getattr(self.shared[0], f"U_{self.width}")  # (D, r)
        v = getattr(self.shared[0], f"V_{self.width}") * self.scale  # (D, r)
        if out >= inside:  # slices below each other: B = [V Sigma_1; V Sigma_2; ...], A = U'
            return u.t(), (v @ self.cores()).flatten(0, 1)[:out]
        down = (self.cores() @ u.t()).transpose(0, 1).flatten(1)  # (r, slices * D)
        return down[:, :inside], v


@apply_peft.register
def apply_fact(spec: Fact, model: nn.Module) -> None:
    """Freeze the encoder, add the shared factors and the cores of every target."""
    root = encoder_of(model)
    targets = resolve_targets(root, spec.targets, allowed=("linear",))
    widths = {min(base_weight(t.layer.module, t.rows).shape) for t in targets}
    shared = FactTensors(spec, widths).to(base_weight(targets[0].layer.module).device)

    def make(target: TargetWeight, weight: Tensor) -> Adapter:
        return FactAdapter(spec, weight, shared)

    attach_all(root, targets, make, "none")
    root.shared = shared


# -------------------------------------------------------------------------------- RepAdapter
#
# RepAdapter: a linear adapter in front of a layer that becomes a part of its weight (Luo et al.,
# 2023).
#
#     y = W f(x) + b,  f(x) = x + s (U (D x + d) + u),
#     so  W' = W + s W U D,  b' = b + s W (U d + u)
#
# The reference system has a GroupNorm between D and U whose statistics depend on the input; there
# is none here, so the equality holds. D (h, in) is dense, U (in, h) has groups.


class RepAdapterLayer(LowRank):
    """The change of W is low-rank: A = D, B = s W U. Starts at U = 0.

    A layer without bias has no d and u, nor has a convolution, whose padding they would pass.
    """

    dropout = 0.0

    def __init__(self, spec: RepAdapter, weight: Tensor, *, shifts: bool) -> None:
        super().__init__()
        width = weight.shape[1]
        self.scale, self.groups = spec.scale, spec.groups
        self.D = nn.Parameter(torch.empty(spec.bottleneck, width))
        nn.init.xavier_uniform_(self.D)
        self.U = nn.Parameter(torch.zeros(width, spec.bottleneck // spec.groups))
        self.d = nn.Parameter(torch.zeros(spec.bottleneck)) if shifts else None
        self.u = nn.Parameter(torch.zeros(width)) if shifts else None

    def dense(self) -> Tensor:
        """s U with its zeros (in, h)."""
        rows = self.U.shape[0] // self.groups
        return self.scale * torch.block_diag(*self.U.split(rows))

    def factors(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """D (h, in) and s W U (out, h)."""
        return self.D, weight @ self.dense().to(weight.dtype)

    def merged_weight(self, weight: Tensor) -> Tensor:
        """W + s W U D over the input channels."""
        change = self.dense() @ self.D  # (in, in)
        return weight + torch.einsum("oc...,ci->oi...", weight, change.to(weight.dtype))

    def merged_bias(self, weight: Tensor, bias: Tensor) -> Tensor:
        """b + W (s U d + s u)."""
        if self.d is None or self.u is None:
            return bias
        return bias + weight @ (self.dense() @ self.d + self.scale * self.u).to(weight.dtype)

    @classmethod
    def run(cls, x: Tensor, layer: nn.Module, members: Members[Self]) -> Tensor:
        """A convolution gets the changed input, a Linear layer the low-rank change."""
        if not isinstance(layer, _ConvNd):
            return super().run(x, layer, members)
        adapter = members[0][1]
        conv = (F.conv1d, F.conv2d, F.conv3d)[base_weight(layer).ndim - 3]
        ones = [1] * (base_weight(layer).ndim - 2)
        low = conv(x, adapter.D.view(*adapter.D.shape, *ones))  # (B, h, ...)
        change = conv(low, adapter.U.view(*adapter.U.shape, *ones), groups=adapter.groups)
        x = x + adapter.scale * change  # (B, in, ...)
        return call(layer, x, base_weight(layer), base_bias(layer))


@apply_peft.register
def apply_rep_adapter(spec: RepAdapter, model: nn.Module) -> None:
    """Freeze the encoder and put an adapter in front of every target.

    Raises:
        UserError: a grouped convolution, which cannot take up a mixture of its groups.
    """
    root = encoder_of(model)
    targets = resolve_targets(root, spec.targets, allowed=("linear", "conv"), unset=("qkv", "fc1"))

    def make(target: TargetWeight, weight: Tensor) -> Adapter:
        layer = target.layer.module
        if getattr(layer, "groups", 1) > 1:
            raise UserError(
                f"rep_adapter: {target.name} is a convolution of {layer.groups} groups, which"
                " cannot take up the adapter; leave it out of peft.targets"
            )
        if weight.shape[1] % spec.groups:
            raise UserError(
                f"peft.groups = {spec.groups} must divide the {weight.shape[1]} inputs of"
                f" {target.name}; {math.gcd(spec.groups, weight.shape[1])} does"
            )
        shifts = base_bias(layer) is not None and not isinstance(layer, _ConvNd)
        return RepAdapterLayer(spec, weight, shifts=shifts)

    attach_all(root, targets, make, "none")
